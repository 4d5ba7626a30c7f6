"""Many configurations of one recipe: trained, compared, and the best one proved."""
