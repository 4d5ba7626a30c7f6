"""Rewards of completions: functions over text, with TRL's signature, and built-in ones.

Nothing here knows of models: what samples completions and what learns from their rewards are
elsewhere. A user's file runs only where the user named it, and in a process of its own.
"""
