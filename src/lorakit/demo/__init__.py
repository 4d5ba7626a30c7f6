"""The tasks of `lorakit demo`: orders into strict JSON, and questions about drawn pictures."""
