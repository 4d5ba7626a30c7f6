"""What an answer must look like: a JSON schema, a regular expression, a choice, or a grammar.

A `Grammar` is what a request says; `GrammarState` applies one to the logits of one answer, token by
token. `grammars.py` makes the second of the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

GrammarKind = Literal["json", "regex", "choice", "grammar", "lark"]

MAX_TEXT = 256 * 1024
"""Characters of a grammar."""

MAX_DIGITS = 128
"""Digits of a JSON number in a row, before and behind the point: a model that likes digits would
go on with one for ever, which a schema allows."""


class GrammarError(InputError):
    """A grammar that cannot be compiled, or takes too long or too much memory for that."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like.

    Args:
        kind: `json`: a JSON schema; `regex`: a regular expression for the whole answer (Rust's
            syntax, without look-around and back-references); `choice`: a JSON list of texts, one of
            which is the answer; `grammar`: a context-free grammar in llguidance's dialect of Lark,
            or in llama.cpp's GBNF; `lark`: one in the former.
        text: the schema, the expression, the list, the grammar.

    Raises:
        GrammarError: the text is too long.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise GrammarError(f"it has {len(self.text)} characters; at most {MAX_TEXT} are read")

    @classmethod
    def of_schema(cls, schema: Any) -> Grammar:
        """Of a JSON schema as an object."""
        return cls("json", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def of_choice(cls, texts: Sequence[str]) -> Grammar:
        """Of texts, one of which is the answer."""
        return cls("choice", json.dumps([*texts], ensure_ascii=False))

    def behind(self, closing: str) -> Grammar:
        """This grammar behind any text that `closing` ends, such as `</think>`.

        A `grammar` stays as it is, and says itself what may stand before.
        """
        if not closing or self.kind in ("grammar", "lark"):
            return self
        if self.kind == "json":
            answer = f"%json {self.text}"
        elif self.kind == "regex":
            answer = "/" + self.text.replace("/", r"\/") + "/"
        else:
            answer = " | ".join(json.dumps(text) for text in json.loads(self.text))
        thought = f"thought[lazy]: /(.|\\n)*/ {json.dumps(closing)}"
        return Grammar(
            "lark", f"start: thought GAP answer\n{thought}\nGAP: /\\s{{0,4}}/\nanswer: {answer}"
        )

    @classmethod
    def from_file(cls, path: Path) -> Grammar:
        """The JSON schema in a file.

        Raises:
            InputError: there is none.
        """
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the schema {path}: {error}") from error
        except ValueError as error:
            raise InputError(f"the schema {path} is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise InputError(f"the schema {path} must be a JSON object")
        return cls.of_schema(schema)


class GrammarState:
    """The place in its grammar that one answer has reached.

    Args:
        matcher: llguidance's, at its beginning.
        tokenizer: llguidance's too, of an answer in JSON; None for other forms.
    """

    def __init__(self, matcher: Any, tokenizer: Any = None) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._digits = 0  # in a row, outside of texts
        self._in_text = self._escaped = False

    def forbid(self, forbidden: torch.Tensor) -> None:
        """Sets `forbidden` (vocabulary,), of bool, where a token cannot come next.

        Raises:
            GrammarError: none can, or the grammar is too complex from here on.
        """
        import torch

        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._require_sound()
        if not bias.any():
            raise GrammarError("no token of the vocabulary continues the answer's grammar")
        width = min(len(bias), len(forbidden))
        torch.eq(bias[:width], 0, out=forbidden[:width])
        forbidden[width:] = True
        if self._digits >= MAX_DIGITS:
            allowed = forbidden.logical_not().nonzero()[:, 0].tolist()
            begins = (self._tokenizer.decode_bytes([token])[:1] for token in allowed)
            more = [token for token, first in zip(allowed, begins, strict=True) if first.isdigit()]
            if len(more) < len(allowed):  # else the number is one that the schema asks for
                forbidden[more] = True

    def took(self, token: int) -> bool:
        """Goes on by a token; whether nothing can follow.

        Raises:
            GrammarError: the grammar is too complex from here on.
        """
        self._matcher.consume_token(token)
        self._require_sound()
        if self._tokenizer is not None:
            self._follow(self._tokenizer.decode_bytes([token]))
        return bool(self._matcher.is_stopped())

    def _follow(self, text: bytes) -> None:
        for byte in text:
            if self._in_text:
                self._in_text = self._escaped or byte != ord('"')
                self._escaped = byte == ord("\\") and not self._escaped
            else:
                self._in_text = byte == ord('"')
                self._digits = self._digits + 1 if ord("0") <= byte <= ord("9") else 0

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(one_line(f"the answer's grammar: {self._matcher.get_error()}"))
