"""Running a model with its adapters: how tokens are chosen, and the chat in a terminal."""
