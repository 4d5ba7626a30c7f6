"""Answers for many at once from one model with adapters: requests, batches, cache, sampling."""
