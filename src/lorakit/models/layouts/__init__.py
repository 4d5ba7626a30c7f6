"""Base models in a form of their own: their files, and the modules that these become."""
