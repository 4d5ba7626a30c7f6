"""A conversation with a model and its adapters: history, commands, and what still fits.

Nothing here knows a terminal: `run` needs lines to read and a function to write, so a pipe and a
test serve as well as a keyboard. The answers are an engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.data.conversations import IMAGE, Message
from lorakit.data.masking import TokenizedRow
from lorakit.data.pictures import open_picture
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling
from lorakit.engine.shown import shown_text
from lorakit.errors import InputError, LorakitError, did_you_mean, listed
from lorakit.folder_name import folder_name
from lorakit.models.picture_reader import reader_of, why_unread

HELP = """\
/reset          forget the conversation
/adapter NAME   answer with another adapter, by its name or folder; without one, show them
/base           answer without the adapter, and again with it
/image FILE     show a picture with the next message
/help           show this
/quit           end the chat, as Ctrl-D does; Ctrl-C stops an answer"""


class ChatSession:
    """An engine, what was said so far, and which adapter answers.

    Attributes:
        adapter: the adapter's name in the engine's pool; None without one.
        history: the turns so far, user and assistant alternating, without the system message.
        use_base: whether the adapter is left out.
        notices: lines for the user about the latest answer.

    Args:
        sampling: with a seed, the same conversation is answered the same.
        system: a system message that opens every conversation.
        variables: further ones of the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        engine: Engine,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.adapter = adapter
        self.sampling = sampling or Sampling()
        self.use_base = False
        self.history: list[Message] = []
        self.notices: list[str] = []
        self._engine = engine
        self._opening = [{"role": "system", "content": system}] if system else []
        self._variables = variables
        self._answers = 0  # since the conversation began
        self._shown: list[str] = []  # pictures for the next message

    @property
    def adapters(self) -> list[str]:
        """The names of the engine's adapters."""
        return [info.name for info in self._engine.pool.infos()]

    def reset(self) -> None:
        """Forgets the conversation; with a seed, the next one is answered as this one was."""
        self.history, self._shown = [], []
        self._answers = 0

    # --- answering ------------------------------------------------------------------------

    def answer(self, text: str) -> Generator[str]:
        """The answer to `text` in pieces, as they are written; then both are in the history.

        Closing the iterator stops the answer; what was said so far is kept, and an answer without
        any text leaves no trace. `notices` tells whether old turns had to be dropped.

        Raises:
            InputError: `text` alone is longer than the model reads, or the template refuses it.
            LorakitError: the model failed.
        """
        question = {"role": "user", "content": self._content(text)}
        self.notices = []
        prompt = self._fit(question)
        sampling = self.sampling
        if sampling.seed is not None:  # no two turns draw the same numbers
            sampling = replace(sampling, seed=(sampling.seed + self._answers) % 2**63)
        self._answers += 1
        self._shown = []
        given = prompt.input_ids, self._who(), sampling, prompt.pictures
        return self._stream(question, self._engine.submit(*given))

    def _content(self, text: str) -> Any:
        """What a message of the user says and shows."""
        if not self._shown:
            return text
        pictures = [{"type": IMAGE, IMAGE: source} for source in self._shown]
        return [*pictures, {"type": "text", "text": text}]

    def _stream(self, question: Message, ticket: Ticket) -> Generator[str]:
        written: list[str] = []
        pieces = iter(ticket)
        try:
            with closing(pieces):
                for piece in pieces:
                    if piece.text:
                        written.append(piece.text)
                        yield piece.text
                    if piece.error:
                        raise LorakitError(piece.error)
        finally:
            if written:
                self.history += [question, {"role": "assistant", "content": "".join(written)}]

    def _who(self) -> str | None:
        return None if self.use_base else self.adapter

    def _fit(self, question: Message) -> TokenizedRow:
        """The tokens of the conversation with `question`, after dropping what leaves no room.

        Room is `max_new_tokens`, or half of the context where that is less.
        """
        limit = self._engine.context_length
        prompt = self._tokens(question)
        room = min(self.sampling.max_new_tokens, limit // 2)
        dropped = 0
        while self.history and len(prompt) + room > limit:
            del self.history[:2]
            dropped += 1
            prompt = self._tokens(question)
        if dropped:
            turns = "the oldest turn" if dropped == 1 else f"the {dropped} oldest turns"
            self.notices.append(f"dropped {turns}: the model reads at most {limit} tokens")
        if len(prompt) >= limit:
            raise InputError(
                f"this message makes {len(prompt)} tokens and the model reads at most {limit}: "
                "shorten it"
            )
        return prompt

    def _tokens(self, question: Message) -> TokenizedRow:
        tokenizer = self._engine.tokenizer_of(self._who())
        messages = [*self._opening, *self.history, question]
        text = shown_text(messages, tokenizer, variables=self._variables)
        return prompt_row(text, messages, tokenizer, where="the message")

    # --- commands -------------------------------------------------------------------------

    def command(self, line: str) -> str | None:
        """Carries out a line that begins with `/`, and returns what to say; None means leave."""
        name, _, argument = line.strip().partition(" ")
        commands: dict[str, Callable[[str], str | None]] = {
            "/reset": self._reset,
            "/adapter": self._adapter,
            "/base": self._base,
            "/image": self._image,
            "/help": lambda _: HELP,
            "/quit": lambda _: None,
        }
        if name not in commands:
            return f"there is no command {name}{did_you_mean(name, commands)}; /help shows them"
        return commands[name](argument.strip())

    def _reset(self, _: str) -> str:
        self.reset()
        return "the conversation is forgotten"

    def _image(self, name: str) -> str:
        """Keeps a picture for the next message; the user may name any file of theirs."""
        file = Path(name).expanduser()
        if not name or not file.is_file():
            return f"no such picture: {name}" if name else "name a picture, as in /image cat.png"
        if reader_of(self._engine.tokenizer_of(self._who())) is None:
            return why_unread(self._engine.tokenizer_of(self._who()))
        try:
            open_picture(str(file.resolve()))
        except InputError as error:
            return f"the picture {name} {error}"
        self._shown.append(str(file.resolve()))
        return f"{name} is shown with the next message"

    def _base(self, _: str) -> str:
        if self.adapter is None:
            return self._no_adapter()
        self.use_base = not self.use_base
        return self._who_answers()

    def _adapter(self, name: str) -> str:
        if not name:
            if self.adapter is None:
                return self._no_adapter()
            return f"{self._who_answers()}; there are: {listed(self.adapters)}"
        try:
            if name not in self.adapters and Path(name).is_dir():
                name = self._load(Path(name))
            self._engine.pool.version(name)
        except InputError as error:
            return str(error)
        self.adapter, self.use_base = name, False
        if notice := self._engine.pool.version(name).info.notice:
            return f"{self._who_answers()} ({notice})"
        return self._who_answers()

    def _load(self, folder: Path) -> str:
        """Loads the adapter in `folder` under the folder's name, once."""
        name = folder_name(folder)
        if name not in self.adapters:
            self._engine.pool.register(name, folder)
        return name

    def _no_adapter(self) -> str:
        return self._engine.pool.closed_because or (
            "the base answers, as there is no adapter: load one with /adapter FOLDER"
        )

    def _who_answers(self) -> str:
        if self.use_base:
            return "the base answers now, without the adapter; /base brings it back"
        return f"the adapter '{self.adapter}' answers now"


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
