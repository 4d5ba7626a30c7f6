"""Adapters as files: opening them, what is recorded beside them, merging them into models."""
