"""The training service: the routes that the Tinker SDK speaks, over the resident engine."""
