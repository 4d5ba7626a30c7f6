"""Several LoRA configurations trained at once on one resident base model."""
