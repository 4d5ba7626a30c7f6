"""One answer, piece by piece, while the model still writes it.

`generate` runs in a thread of its own and hands pieces over through transformers' streamer. What
goes wrong there is raised here, and whoever stops listening stops the model.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.inference.sampling import generate

if TYPE_CHECKING:
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
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
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
            streamer.on_finalized_text("", stream_end=True)  # the listener must not wait for ever

    # A daemon, so that a second Ctrl-C ends the program even while a token is computed.
    thread = threading.Thread(target=work, name="lorakit-generate", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        reason = str(failures[0]).strip().partition("\n")[0] or type(failures[0]).__name__
        raise LorakitError(f"the model failed while answering: {reason}") from failures[0]
