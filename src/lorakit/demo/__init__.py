"""The task of `lorakit demo`: a customer's free-text order into strict JSON."""
