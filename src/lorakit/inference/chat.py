"""A conversation with a model and its adapters: history, commands, and what still fits.

Nothing here knows a terminal: `run` needs lines to read and a function to write, so a pipe and a
test serve as well as a keyboard. How an answer streams is `streaming.py`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Message
from lorakit.errors import InputError, did_you_mean, listed
from lorakit.inference.sampling import Sampling, generation_settings, prompt_tokens
from lorakit.inference.streaming import stream_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = """\
/reset          forget the conversation
/adapter NAME   answer with another adapter, by its name or folder; without one, show them
/base           answer without the adapter, and again with it
/help           show this
/quit           end the chat, as Ctrl-D does; Ctrl-C stops an answer"""


class ChatSession:
    """A model, what was said so far, and which adapter answers.

    Attributes:
        history: the turns so far, user and assistant alternating, without the system message.
        use_base: whether the adapter is left out.
        notices: lines for the user about the latest answer.

    Args:
        model: a `LoraModel`, or a plain transformers model; it is put in evaluation mode.
        system: a system message that opens every conversation.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.use_base = False
        self.history: list[Message] = []
        self.notices: list[str] = []
        self._opening = [{"role": "system", "content": system}] if system else []
        self._settings = generation_settings(model, tokenizer, self.sampling)
        self.reset()

    @property
    def adapters(self) -> list[str]:
        """The names of the model's adapters, none for a plain model."""
        return list(getattr(self.model, "adapters", []))

    def reset(self) -> None:
        """Forgets the conversation, and starts the random numbers anew when there is a seed."""
        self.history = []
        if self.sampling.seed is not None:
            import torch

            torch.manual_seed(self.sampling.seed)  # `generate` draws from the global generator

    # --- answering ------------------------------------------------------------------------

    def answer(self, text: str) -> Generator[str]:
        """The answer to `text` in pieces, as they are written; then both are in the history.

        Closing the iterator stops the model; what it said so far is kept, and an answer without
        any text leaves no trace. `notices` tells whether old turns had to be dropped.

        Raises:
            InputError: `text` alone is longer than the model reads, or the template refuses it.
            LorakitError: the model failed.
        """
        question = {"role": "user", "content": text}
        self.notices = []
        input_ids = self._fit(question)
        settings = copy.copy(self._settings)
        if limit := self._context_length():
            settings.max_new_tokens = min(settings.max_new_tokens, limit - len(input_ids))
        return self._stream(question, input_ids, settings)

    def _stream(self, question: Message, input_ids: list[int], settings: Any) -> Generator[str]:
        around = self.model.disable_adapter() if self.use_base else None
        written: list[str] = []
        pieces = stream_answer(self.model, self.tokenizer, input_ids, settings, around)
        try:
            with closing(pieces):
                for piece in pieces:
                    written.append(piece)
                    yield piece
        finally:
            if written:
                self.history += [question, {"role": "assistant", "content": "".join(written)}]

    def _fit(self, question: Message) -> list[int]:
        """Token ids of the conversation with `question`, after dropping what leaves no room.

        Room is `max_new_tokens`, or half of the context where that is less.
        """
        limit = self._context_length()
        input_ids = self._tokens(question)
        if not limit:
            return input_ids
        room = min(self.sampling.max_new_tokens, limit // 2)
        dropped = 0
        while self.history and len(input_ids) + room > limit:
            del self.history[:2]
            dropped += 1
            input_ids = self._tokens(question)
        if dropped:
            turns = "the oldest turn" if dropped == 1 else f"the {dropped} oldest turns"
            self.notices.append(f"dropped {turns}: the model reads at most {limit} tokens")
        if len(input_ids) >= limit:
            raise InputError(
                f"this message makes {len(input_ids)} tokens and the model reads at most {limit}: "
                "shorten it"
            )
        return input_ids

    def _tokens(self, question: Message) -> list[int]:
        return prompt_tokens([*self._opening, *self.history, question], self.tokenizer)

    def _context_length(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    # --- commands -------------------------------------------------------------------------

    def command(self, line: str) -> str | None:
        """Carries out a line that begins with `/`, and returns what to say; None means leave."""
        name, _, argument = line.strip().partition(" ")
        commands: dict[str, Callable[[str], str | None]] = {
            "/reset": self._reset,
            "/adapter": self._adapter,
            "/base": self._base,
            "/help": lambda _: HELP,
            "/quit": lambda _: None,
        }
        if name not in commands:
            return f"there is no command {name}{did_you_mean(name, commands)}; /help shows them"
        return commands[name](argument.strip())

    def _reset(self, _: str) -> str:
        self.reset()
        return "the conversation is forgotten"

    def _base(self, _: str) -> str:
        if not self.adapters:
            return "this model has no adapter: the base answers already"
        self.use_base = not self.use_base
        return self._who_answers()

    def _adapter(self, name: str) -> str:
        if not self.adapters:
            return "this model has no adapter: start the chat with an adapter's folder"
        if not name:
            return f"{self._who_answers()}; there are: {listed(self.adapters)}"
        try:
            if name not in self.adapters and Path(name).is_dir():
                name = self._load(Path(name))
            self.model.set_adapter(name, inference_mode=True)
        except InputError as error:
            return str(error)
        self.use_base = False
        return self._who_answers()

    def _load(self, folder: Path) -> str:
        """Loads the adapter in `folder` under the folder's name, once."""
        name = folder.resolve().name.replace(".", "-")  # a module's name may hold no dot
        if name not in self.adapters:
            self.model.load_adapter(folder, adapter_name=name)
        return name

    def _who_answers(self) -> str:
        if self.use_base:
            return "the base answers now, without the adapter; /base brings it back"
        return f"the adapter '{self.model.active_adapter}' answers now"


def run(session: ChatSession, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answers `lines` until they end, one is `/quit`, or Ctrl-C comes between two answers.

    Ctrl-C during an answer stops that answer only. A message that cannot be answered (it is too
    long, the template refuses it) is told so in a line, and the chat goes on.

    Raises:
        LorakitError: the model failed.
    """
    try:
        for line in lines:
            text = line.strip()
            if text.startswith("/"):
                reply = session.command(text)
                if reply is None:
                    return
                write(f"{reply}\n")
            elif text:
                _show_answer(session, text, write)
    except KeyboardInterrupt:
        write("\n")


def _show_answer(session: ChatSession, text: str, write: Callable[[str], None]) -> None:
    try:
        pieces = session.answer(text)
        for notice in session.notices:
            write(f"({notice})\n")
        with closing(pieces):
            for piece in pieces:
                write(piece)
    except KeyboardInterrupt:
        write(" (stopped)")
    except InputError as error:
        write(f"({error})")
    write("\n")
