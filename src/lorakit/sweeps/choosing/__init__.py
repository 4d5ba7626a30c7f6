"""Which configuration goes on, which one is best, and how sure that is."""
