"""One answer, piece by piece, while the model still writes it.

The model runs in a thread of its own. What goes wrong there is raised here, and whoever stops
listening stops the model.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.inference.sampling import generate

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def stream_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: list[int],
    settings: GenerationConfig,
    around: AbstractContextManager[Any] | None = None,
) -> Generator[str]:
    """Pieces of the answer to `input_ids`, which joined are the answer without special tokens.

    Closing the iterator early ends the generation after the token in progress, and waits for it.

    Args:
        around: entered while the model generates, such as `model.disable_adapter()`.

    Raises:
        LorakitError: the model failed, with the reason; raised after the pieces before it.
    """
    import torch

    streamer = _Streamer(tokenizer)
    stop = threading.Event()
    failures: list[BaseException] = []

    def stopped(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

    def work() -> None:
        try:
            prompt = torch.tensor([input_ids], device=next(model.parameters()).device)
            with around or nullcontext():
                generate(
                    model,
                    settings,
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    stopping_criteria=[stopped],
                )
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.pieces.put(None)  # whatever happened, the listener must not wait for ever

    # A daemon, so that a second Ctrl-C ends the program even while a token is computed.
    thread = threading.Thread(target=work, name="lorakit-generate", daemon=True)
    try:
        thread.start()
        while (piece := streamer.pieces.get()) is not None:
            yield piece
    finally:
        stop.set()
        if thread.ident:
            thread.join()
    if failures:
        reason = str(failures[0]).strip().partition("\n")[0] or type(failures[0]).__name__
        raise LorakitError(f"the model failed while answering: {reason}") from failures[0]


class _Streamer:
    """Takes tokens from `generate` and puts text into the queue `pieces`.

    transformers' `TextIteratorStreamer` waits for a space, and so shows an answer without any,
    such as compact JSON, only when it is finished. This one waits for whole characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self._tokenizer = tokenizer
        self._answer: list[int] | None = None  # None until the prompt has come
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt's tokens first, then one token of the answer at a time."""
        if self._answer is None:
            self._answer = []
            return
        self._answer += value.tolist()
        text = self._text()
        if not text.endswith("\ufffd"):  # the first bytes of a character decode to this
            self._show(text)

    def end(self) -> None:
        """The answer is complete."""
        self._show(self._text())

    def _text(self) -> str:
        # All of it anew: what a token reads as can depend on the tokens before it.
        return str(self._tokenizer.decode(self._answer or [], skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self.pieces.put(text[self._shown :])
            self._shown = len(text)
