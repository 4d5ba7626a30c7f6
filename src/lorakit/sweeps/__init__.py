"""Many configurations of one adapter: trained on one base, the losers stopped, the best proved."""
