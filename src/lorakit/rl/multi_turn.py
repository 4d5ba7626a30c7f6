"""Conversations of a model in training with environments and tools, turn by turn.

Each is only appended to: the tokens that the model has sampled, and between them those of the
messages that answer it, which are never learned (`Rollout.sampled`). All conversations of a step
share one batch; an environment's answer joins it a fixed number of the batch's steps after it was
asked for, so that the same seeds make the same batches however quickly environments answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorakit.data.conversations import Message, text_of
from lorakit.data.next_turn import next_turn
from lorakit.data.tool_calls import MalformedCallError, ToolCalls
from lorakit.engine.sampling import prompt_tokens
from lorakit.errors import InputError
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.rl.environment_process import (
    EnvironmentFailedError,
    EnvironmentProcess,
    RemoteEnvironment,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.samples import Sample
    from lorakit.engine.sampling import Ending
    from lorakit.rl.engine_rollouts import Written

DELAY = 4
"""Steps of the batch from a turn's end to when what answers it is taken in, or waited for."""

_WAVE = 64
"""Environments that are reset at once."""


@dataclass(eq=False)
class Conversation:
    """One rollout while it is written.

    Attributes:
        prompt: the tokens before the first turn.
        tools: the functions that the model is shown.
        tokens, logprobs, sampled: of the rollout so far.
        messages: those behind the prompt.
        reward: what the environment has given so far; None where it gives none.
        ended: why it is over (`stop`, `length`, `max_turns`, `failed`); empty while it is not.
        closed: its environment is let go of.
        failure: what went wrong with the environment.
    """

    asked: AskedPrompt
    environment: RemoteEnvironment
    prompt: list[int] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    reward: float | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    turns: int = 0
    calls: int = 0
    failed_calls: int = 0
    ended: str = ""
    closed: bool = False
    failure: str = ""

    @property
    def seed(self) -> int:
        """Of the sampling of the next turn."""
        return (self.asked.seed + 7919 * self.turns) % 2**32

    def room(self, most: int) -> int:
        """How many tokens may still come, where a row has at most so many."""
        left = self.asked.max_new_tokens - len(self.tokens)
        return min(left, most - len(self.prompt) - len(self.tokens))

    def rollout(self) -> Rollout:
        """What has become of it."""
        cut = self.ended == "length"
        measured = {
            "turns": self.turns,
            "tool_calls": self.calls,
            "tool_failures": self.failed_calls,
            **{name: fmean(values) for name, values in self.metrics.items()},
        }
        return Rollout(
            self.tokens,
            self.logprobs,
            "length" if cut else "stop",
            "\n".join(m["content"] for m in self.messages if m["role"] == "assistant"),
            self.messages,
            self.sampled,
            None if self.failure else self.reward,
            {f"environment/{name}": float(value) for name, value in measured.items()},
            self.prompt,
            self.failure,
        )


class Conversations:
    """All conversations of a step.

    Args:
        process: of the environments.
        tokenizer: of the model, with its chat template.
        reader: reads the calls in what the model writes.
        max_turns: the most turns of the model in a conversation.
        context_length: the most tokens of a conversation.
        ending: what ends a turn.
    """

    def __init__(
        self,
        process: EnvironmentProcess,
        tokenizer: PreTrainedTokenizerBase,
        reader: ToolCalls,
        max_turns: int,
        context_length: int,
        ending: Ending,
    ) -> None:
        self._ending = ending
        self._process, self._tokenizer, self._reader = process, tokenizer, reader
        self._max_turns, self._most = max_turns, context_length
        self._waiting: deque[tuple[int, Conversation, Callable[[Conversation], None]]] = deque()
        self._time = 0
        self.all: list[Conversation] = []

    # --- beginning --------------------------------------------------------------------------

    def begin(self, asked: Sequence[AskedPrompt]) -> list[Conversation]:
        """Opens an environment for each prompt; returns those conversations that have begun.

        The environments of all completions of a prompt have the same seed, so that what is
        compared begins alike.

        Raises:
            InputError: a row cannot be rendered with the tools, or shows pictures.
            LorakitError: no process can be started.
        """
        seed = 0
        for given in asked:
            seed = given.seed if given.generation == 0 else seed
            self.all.append(Conversation(given, self._process.open(seed)))
        for at in range(0, len(self.all), _WAVE):
            wave = self.all[at : at + _WAVE]
            for one in wave:
                self._ask(one, self._reset, "reset", _row_of(sample_of(one.asked)))
            while self._waiting:
                _, one, take_in = self._waiting.popleft()
                take_in(one)
        return [one for one in self.all if not one.ended]

    def _reset(self, one: Conversation) -> None:
        one.prompt = list(one.asked.tokens)
        observed = self._answer(one)
        if one.ended:
            return
        sample = sample_of(one.asked)
        messages = [*sample.prompt]
        if isinstance(observed, str):
            messages = _with_text(messages, observed)
        elif observed:
            messages += observed
        one.tools = (*sample.tools, *self._process.tools)
        if observed or self._process.tools:
            try:
                one.prompt = prompt_tokens(messages, self._tokenizer, one.tools)
            except InputError as error:
                raise InputError(f"{sample.where}: {error}") from error
        if one.room(self._most) < 1:
            one.ended = "length"
            self._finish(one)

    # --- turns ------------------------------------------------------------------------------

    def wrote(self, one: Conversation, turn: Written) -> None:
        """Takes in what the model has written, and asks for what answers it."""
        ids = turn.tokens
        one.tokens += ids
        one.logprobs += turn.logprobs
        one.sampled += [True] * len(ids)
        one.turns += 1
        text = str(self._tokenizer.decode(turn.before(self._ending), skip_special_tokens=False))
        malformed = ""
        try:
            message = self._reader.message(text, one.tools)
        except MalformedCallError as error:
            message, malformed = self._reader.plain(text), str(error)
        one.messages.append(message)
        one.ended = "length" if turn.cut else ""
        if self._process.steps:
            self._ask(one, self._stepped, "step", message)
            return
        calls = [call["function"] for call in message.get("tool_calls", ())]
        one.calls += len(calls) + bool(malformed)
        one.failed_calls += bool(malformed)
        if not one.ended and not calls and not malformed:
            one.ended = "stop"
        elif not one.ended and one.turns >= self._max_turns:
            one.ended = "max_turns"
        if one.ended:
            self._finish(one)
        elif malformed:
            error_text = f"error: the tool call cannot be read: {malformed}"
            answer = [{"role": "tool", "name": "error", "content": error_text}]
            self._later(one, lambda one: self._append(one, answer))
        else:
            self._ask(one, self._called, "call", calls)

    def ready(self, idle: bool) -> list[Conversation]:
        """Those whose next turn is to be written now; called once for each step of the batch.

        Args:
            idle: nothing else is left to write, so what is asked is waited for.
        """
        self._time += 1
        found: list[Conversation] = []
        while self._waiting and (self._waiting[0][0] <= self._time or (idle and not found)):
            due, one, take_in = self._waiting.popleft()
            self._time = max(self._time, due)
            take_in(one)
            if not one.ended and not one.closed:
                found.append(one)
        return found

    def _stepped(self, one: Conversation) -> None:
        answer = self._answer(one)
        if answer is None:
            return
        one.reward = (one.reward or 0.0) + answer["reward"]
        for name, value in answer["metrics"].items():
            one.metrics.setdefault(name, []).append(value)
        observed = answer["messages"]
        if isinstance(observed, str):
            observed = [{"role": "user", "content": observed}]
        if not one.ended and (answer["done"] or not observed):
            one.ended = "stop"
        elif not one.ended and one.turns >= self._max_turns:
            one.ended = "max_turns"
        if one.ended:
            self._finish(one)
        else:
            self._append(one, observed)

    def _called(self, one: Conversation) -> None:
        results = self._answer(one)
        if results is None:
            return
        one.failed_calls += sum(not result["ok"] for result in results)
        calls = one.messages[-1]["tool_calls"]
        pairs = zip(calls, results, strict=True)
        self._append(one, [_result(call, result["content"]) for call, result in pairs])

    def _append(self, one: Conversation, messages: Sequence[Message]) -> None:
        """Puts messages behind the conversation; without room for them it ends where it is."""
        ids = next_turn(messages, self._tokenizer, one.tools, one.tokens[-1])
        if one.room(self._most) <= len(ids):
            one.ended = "length"
            self._finish(one)
            return
        one.messages += messages
        one.tokens += ids
        one.logprobs += [0.0] * (len(ids) if one.logprobs else 0)
        one.sampled += [False] * len(ids)

    def _finish(self, one: Conversation) -> None:
        if self._process.rewards:
            self._ask(one, self._rewarded, "get_reward")
        else:
            self._close(one)

    def _rewarded(self, one: Conversation) -> None:
        value = self._answer(one)
        if value is not None:
            one.reward = (one.reward or 0.0) + value
        self._close(one)

    def _close(self, one: Conversation) -> None:
        if not one.closed:
            one.closed = True
            if one.failure:
                one.environment.close()
            else:
                one.environment.let_go()

    # --- asking -----------------------------------------------------------------------------

    def _later(self, one: Conversation, take_in: Callable[[Conversation], None]) -> None:
        self._waiting.append((self._time + DELAY, one, take_in))

    def _ask(
        self, one: Conversation, take_in: Callable[[Conversation], None], what: str, *given: Any
    ) -> None:
        """Asks an environment for something, and has the answer taken in later."""
        try:
            one.environment.ask(what, *given)
        except EnvironmentFailedError as error:
            self._fail(one, error)
        else:
            self._later(one, take_in)

    def _answer(self, one: Conversation) -> Any:
        """What an environment answers; None where it has failed, which ends the conversation."""
        try:
            return one.environment.answer()
        except EnvironmentFailedError as error:
            self._fail(one, error)
            return None

    def _fail(self, one: Conversation, error: EnvironmentFailedError) -> None:
        one.failure = str(error)
        one.ended = one.ended or "failed"
        self._close(one)

    def close(self) -> None:
        """Ends what is still open."""
        for one in self.all:
            if not one.closed:
                one.closed = True
                one.environment.close()


def _result(call: Mapping[str, Any], content: str) -> Message:
    """A function's result as a message."""
    own = {"tool_call_id": call["id"]} if "id" in call else {}
    return {"role": "tool", "name": call["function"]["name"], "content": content, **own}


def sample_of(asked: AskedPrompt) -> Sample:
    """The row that a prompt is of. Raises InputError where it shows pictures."""
    assert asked.sample is not None
    if asked.sample.pictures:
        raise InputError(
            f"{asked.sample.where}: the row shows pictures, and conversations with environments "
            "and tools are of text: leave the row out"
        )
    return asked.sample


def _row_of(sample: Sample) -> dict[str, Any]:
    return dict(sample.columns or {})


def _with_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Messages with a text behind the last one's, as TRL adds what `reset` returns."""
    *before, last = messages
    return [*before, {**last, "content": f"{text_of(last['content'])}{text}"}]
