"""One request that was handed to an engine, and the pieces of its answer.

The engine's thread puts pieces in; one listener takes them out, a thread or a coroutine.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.picture_rows import RowPictures
from lorakit.engine.grammar import GrammarState
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.models.load import positions_of
from lorakit.models.loaded import writes_text

if TYPE_CHECKING:
    from lorakit.engine.picture_prompt import Prepared

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token, what it reads as, and the log of its probability before any sampling setting."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class ChosenToken(TokenLogprob):
    """A token of an answer, and the likeliest ones in its place."""

    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """Some more of an answer.

    Attributes:
        text: what was added; it may be empty.
        logprobs: of the tokens since the last piece, where they were asked for.
        new_tokens: how many tokens the answer has so far.
        finish_reason: why it ended, in the last piece alone.
        error: what went wrong, with the reason `error`.
        refused: whether that is what the request asked for, such as a grammar that no token
            continues.
        scores: what a reward model's or classifier's head gives to the prompt, a number a label.
        embedding: of the prompt, where it was asked for.
    """

    text: str = ""
    logprobs: tuple[ChosenToken, ...] = ()
    new_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""
    refused: bool = False
    scores: tuple[float, ...] = ()
    embedding: tuple[float, ...] | None = None


@dataclass(eq=False)
class Ticket:
    """A request in an engine's hands. One listener may take the pieces of its answer.

    Attributes:
        prepared: its pictures as the model is given them, until their features are computed.
        types: of the prompt's tokens (`token_type_ids`), where the tokenizer tells a pair's texts
            apart; else empty.
        form: the form of its answer, at its beginning; None for any text.
        cached_tokens: of the prompt, that were computed for another request; known with the first
            piece.
        tokens: of the answer, with the one that ended it; all of them with the last piece.
    """

    prompt: tuple[int, ...]
    adapter: str | None
    sampling: Sampling
    pictures: RowPictures | None = None
    prepared: tuple[Prepared, ...] | None = None
    types: tuple[int, ...] = ()
    form: GrammarState | None = None
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    cancelled: Event = field(default_factory=Event)
    _pieces: SimpleQueue[AnswerPiece] = field(default_factory=SimpleQueue)
    _lock: Lock = field(default_factory=Lock)
    _listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.prompt)

    def cancel(self) -> None:
        """Has the engine stop the answer at its next step. It then ends as `cancelled`."""
        self.cancelled.set()

    def put(self, piece: AnswerPiece) -> None:
        """For the engine: hands a piece to whoever listens, now or later."""
        with self._lock:
            self._pieces.put(piece)
            if self._listener is not None:
                loop, came = self._listener
                try:
                    loop.call_soon_threadsafe(came.set)
                except Exception:  # the loop is closed: nobody listens any more
                    self.cancel()

    def __iter__(self) -> Generator[AnswerPiece]:
        """The pieces until the answer ends. Who stops listening early cancels it."""
        ended = False
        try:
            while not ended:
                piece = self._pieces.get()
                ended = piece.finish_reason is not None
                yield piece
        finally:
            if not ended:
                self.cancel()

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """As iterating, without blocking the event loop."""
        came = asyncio.Event()
        with self._lock:
            self._listener = asyncio.get_running_loop(), came
        ended = False
        try:
            while not ended:
                while not self._pieces.empty():
                    piece = self._pieces.get_nowait()
                    ended = piece.finish_reason is not None
                    yield piece
                if not ended:
                    await came.wait()
                    came.clear()
        finally:
            if not ended:
                self.cancel()


def check_prompt(prompt: Sequence[int], context_length: int, vocabulary: int) -> None:
    """Raises InputError for a prompt that is empty, or too long, or has numbers that are no tokens.

    Args:
        context_length: the most tokens of prompt and answer together.
        vocabulary: how many tokens the model knows.
    """
    if not prompt:
        raise InputError("the prompt is empty")
    if len(prompt) >= context_length:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and with the answer at most "
            f"{context_length} are read: shorten it"
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise InputError(f"the prompt's tokens must be from 0 to {vocabulary - 1}")


def context_length_of(model: Any, wanted: int | None = None, longest: int | None = None) -> int:
    """The most tokens a row may have.

    Args:
        longest: what is taken where nothing is wanted, unless the model has fewer positions.

    Raises:
        InputError: the model reads fewer than wanted.
    """
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not writes_text(model):  # RoBERTa counts positions from 2
        own = positions_of(model)
    if wanted is not None and (wanted < 2 or (own and wanted > own)):
        raise InputError(f"context_length must be from 2 to {own or 'any number'}, not {wanted}")
    return wanted or min(longest or own or 2048, own or sys.maxsize)
