"""Running adapters for people: the chat in a terminal."""
