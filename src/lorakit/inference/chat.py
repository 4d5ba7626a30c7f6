"""A conversation with an adapter: its history, its commands, and answers that stream.

The terminal is left to `run`, which needs only lines to read and a function to write, so a pipe
and a test serve as well as a keyboard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Message
from lorakit.data.templates import render
from lorakit.errors import InputError, LorakitError, did_you_mean, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = """\
/reset          forget the conversation
/adapter NAME   answer with another adapter: its name, or its folder
/base           answer without any adapter; again, or /adapter, turns it back on
/help           show this
/quit           leave"""
_COMMANDS = ("/reset", "/adapter", "/base", "/help", "/quit")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass
class ChatSession:
    """A model, the conversation so far, and which adapter answers.

    Args:
        model: a `LoraModel`.
        system: a system message that opens every conversation.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    use_base: bool = False
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()
        if self.sampling.seed is not None:
            import torch

            torch.manual_seed(self.sampling.seed)

    def reset(self) -> None:
        """Forgets the conversation, but not the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> str | None:
        """Carries out `/…` and returns what to say about it; None means leave."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return None
        if name == "/help":
            return HELP
        if name == "/reset":
            self.reset()
            return "(the conversation is forgotten)"
        if name == "/base":
            self.use_base = not self.use_base
            return f"(answering {self._who()})"
        if name == "/adapter":
            return self._choose(argument)
        return f"{name} is not a command{did_you_mean(name, _COMMANDS)}; /help shows them"

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; question and answer join the conversation.

        Closing the iterator stops the model; what it said so far is kept.

        Raises:
            InputError: the conversation does not fit the model's context, or its template.
            LorakitError: the model failed.
        """
        question: Message = {"role": "user", "content": text}
        inputs = self._fitted([*self.messages, question])
        pieces: list[str] = []
        try:
            for piece in self._stream(inputs):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _choose(self, name: str) -> str:
        names = self.model.adapters
        if not name:
            return f"adapters: {listed(names)}; answering {self._who()}"
        try:
            if name not in names and Path(name).is_dir():
                folder, name = name, Path(name).resolve().name.replace(".", "-")
                if name not in names:
                    self.model.load_adapter(folder, name)
            self.model.set_adapter(name, inference_mode=True)
        except InputError as error:
            return f"({error})"
        self.use_base = False
        return f"(answering {self._who()})"

    def _who(self) -> str:
        return "without an adapter" if self.use_base else f"with '{self.model.active_adapter}'"

    def _fitted(self, messages: list[Message]) -> Any:
        """The tokens of the conversation; its oldest turns are dropped until it fits."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        room = context - self.sampling.max_new_tokens if context else None
        first = 1 if self.system else 0
        while True:
            text = render(messages, self.tokenizer, add_generation_prompt=True)
            inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            if room is None or inputs["input_ids"].shape[1] <= room:
                self.messages = messages[:-1]
                return inputs
            if len(messages) <= first + 1:
                raise InputError(f"this message alone is longer than the {room} tokens of room")
            del messages[first : first + 2]

    def _stream(self, inputs: Any) -> Iterator[str]:
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stop = Event()

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
                return stop.is_set()

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def generate() -> None:
            import torch

            bare = self.model.disable_adapter() if self.use_base else nullcontext()
            try:
                with bare, torch.inference_mode():
                    self.model.generate(
                        **inputs.to(self.model.device),
                        generation_config=self._settings(),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                    )
            except BaseException as error:  # it must reach the thread that reads
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if failure:
            raise LorakitError(f"the model failed: {failure[0]}") from failure[0]

    def _settings(self) -> Any:
        from lorakit.evaluation.answers import greedy_settings

        settings = greedy_settings(self.model, self.tokenizer, self.sampling.max_new_tokens)
        if self.sampling.temperature > 0:
            settings.do_sample = True
            settings.temperature = self.sampling.temperature
            settings.top_p = self.sampling.top_p
        return settings


def run(session: ChatSession, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answers `lines` until they end or one of them is `/quit`.

    Ctrl-C while the model answers stops the answer, not the chat.
    """
    for line in lines:
        text = line.strip()
        if text.startswith("/"):
            reply = session.command(text)
            if reply is None:
                return
            write(f"{reply}\n")
        elif text:
            _answer(session, text, write)


def _answer(session: ChatSession, text: str, write: Callable[[str], None]) -> None:
    pieces = session.answer(text)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        write(" (stopped)")
    except InputError as error:
        write(f"({error})")
    write("\n")
