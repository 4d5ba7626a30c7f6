"""Training an adapter: the recipe, the trainer, and what is recorded of a run."""
