"""A run's folder as one page that a person can read: what was learned, how, and from what."""
