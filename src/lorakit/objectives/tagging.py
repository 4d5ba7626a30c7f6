"""A tag for each word of a text, such as the BIO tags of named entities."""

from __future__ import annotations

from lorakit.data.label_rows import tokenize_words
from lorakit.objectives.classification import Classification


class Tagging(Classification):
    """As a class for each row, with a label at the first token of each word."""

    name = "tagging"
    task_type = "TOKEN_CLS"
    unit = "word"
    words = True
    to_row = staticmethod(tokenize_words)
