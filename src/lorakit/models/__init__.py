"""Base models: from a name to a loaded model and tokenizer, and how they are run."""
