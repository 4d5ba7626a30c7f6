"""Completions of the model in training: who writes them, and how they get into its batches.

An objective says which prompts it asks and what it learns of the completions
(`Objective.sampled_rows`); here they are sampled, those of all batches of a step together.
"""
