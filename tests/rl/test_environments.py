"""Rollouts of several turns: what was sampled is what is learned, and all else is only read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.data.samples import Sample
from lorakit.data.templates import render
from lorakit.engine.sampling import prompt_tokens
from lorakit.errors import InputError, LorakitError
from lorakit.lora import LoraModel
from lorakit.objectives.grpo import Grpo
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.rl.environments import EnvironmentRollouts
from scripted import AGAIN, ASK, END, calling, save_scripted_model

ADD, SLEEP = calling("add", '{"a": 2, "b": 2}'), calling("sleep", "{}")
BAD, LEAVE, BOTH = "<tool_call>{oops</tool_call>", calling("leave", "{}"), ADD + "\n" + SLEEP
FILE = '''
import os, time

class Sums:
    """Adds for the model, and is content when it was asked."""

    def reset(self, answer=None, **row):
        self.answer, self.calls = answer, 0
        return " Use add."

    def add(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: one number.
            b: the other.
        """
        time.sleep(os.getpid() % 4 / 50)
        self.calls += 1
        return a + b

    def sleep(self) -> str:
        """Sleeps for long."""
        time.sleep(100)

    def leave(self) -> str:
        """Ends the process."""
        os._exit(0)

    def get_reward(self):
        return min(self.calls, 1) + (self.answer or 0)

class Game:
    """Goes on for as many turns as the row says."""

    def __init__(self, says):
        self.says = says

    def reset(self, answer):
        self.turn, self.turns = 0, answer
        if answer == 13:
            raise RuntimeError("no board")

    def step(self, message):
        self.turn += 1
        calls = len(message["tool_calls"])
        return self.says, calls, self.turn == self.turns, {"turn": self.turn}

class NoReward:
    def reset(self, **row): ...

    def tool(self) -> str:
        """Does nothing."""
'''


@dataclass
class Talk:
    """A model, and rollouts of it with an environment of the file."""

    file: Path
    folder: Path

    def __post_init__(self) -> None:
        self.sources: dict[str, EnvironmentRollouts] = {}
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.model = LoraModel(model, None).eval()

    def source(self, name: str, **options: Any) -> EnvironmentRollouts:
        """A source with an environment; those with the same name are the same."""
        if name not in self.sources:
            own = {"type": f"{self.file}:{name}", **options.pop("settings", {})}
            objective = Grpo(environment=own, **options)
            self.sources[name] = EnvironmentRollouts(objective, self.tokenizer)
        return self.sources[name]

    def close(self) -> None:
        for source in self.sources.values():
            source.close()

    def asked(self, number: int, **changes: Any) -> AskedPrompt:
        messages = ({"role": "user", "content": f"{number} + {number}?"},)
        empty = {"role": "assistant", "content": ""}
        sample = Sample((*messages, empty), None, f"rows:{number}", columns={"answer": number})
        tokens = prompt_tokens(messages, self.tokenizer)
        given: dict[str, Any] = {"max_new_tokens": 3000, "temperature": 1.0, "seed": number}
        return AskedPrompt(tokens, **{**given, **changes}, logprobs=True, sample=sample)

    def rollouts(self, name: str, asked: Sequence[AskedPrompt]) -> list[Rollout]:
        return self.sources[name].write(asked, self.model, 0)

    def text(self, rollout: Rollout, sampled: bool) -> str:
        pairs = zip(rollout.tokens, rollout.learned, strict=True)
        return self.tokenizer.decode([token for token, own in pairs if own == sampled])


def measured(rollout: Rollout) -> dict[str, float]:
    return {name.removeprefix("environment/"): value for name, value in rollout.metrics.items()}


SURE = 60.0


def talk(folder: Path, first: Mapping[str, float], noise: float = 0.0) -> Talk:
    """A model that begins with one of these phrases, and says `four` behind a tool's result."""
    follows: dict[str, Mapping[str, float]] = {ASK: first, AGAIN: {"It is four.": SURE}}
    follows |= {phrase: {END: SURE} for phrase in (*first, "It is four.")}
    (folder / "env.py").write_text(FILE)
    return Talk(folder / "env.py", save_scripted_model(folder / "model", follows, noise))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """A model that always calls `add`."""
    made = talk(tmp_path_factory.mktemp("sums"), {ADD: SURE})
    made.source("Sums", max_turns=2)
    made.source("Game", max_turns=3, settings={"says": "Go on. "})
    yield made
    made.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """A model that draws what it says."""
    phrases = (ADD, "Seven.", BAD, BOTH, LEAVE)
    made = talk(tmp_path_factory.mktemp("mixed"), dict.fromkeys(phrases, SURE))
    made.source("Sums", environment_timeout=2.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def drawn(mixed: Talk) -> list[Rollout]:
    """More of them than are written at once."""
    return mixed.rollouts("Sums", [mixed.asked(n) for n in range(24)])


def test_a_tools_result_is_read_and_what_the_model_wrote_is_learned(sums: Talk):
    [found] = sums.rollouts("Sums", [sums.asked(1)])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert list(found.messages) == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "It is four."},
    ]
    assert sums.text(found, sampled=True) == f"{ADD}{END}It is four.{END}"
    assert sums.text(found, sampled=False) == (
        "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n<|again|>"
    )
    assert found.reward == 2.0, "one call, and the row's answer"
    assert found.finish_reason == "stop"
    assert measured(found) == {"turns": 2, "tool_calls": 1, "tool_failures": 0}
    # Prompt and all: what the template writes of the whole conversation, token by token.
    assert found.prompt is not None
    asked = {"role": "user", "content": "1 + 1? Use add."}
    tools = sums.source("Sums")._process.tools
    whole = render([asked, *found.messages], sums.tokenizer, tools=tools)
    ids = sums.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*found.prompt, *found.tokens] == ids[:-1], "but for the line break at the end"


def test_log_probabilities_are_those_of_the_model_that_reads_it_all(mixed: Talk):
    for found in mixed.rollouts("Sums", [mixed.asked(n, temperature=0.7) for n in range(4)]):
        assert found.prompt is not None
        ids = torch.tensor([[*found.prompt, *found.tokens]])
        with torch.no_grad():
            logs = (mixed.model(input_ids=ids).logits[0, :-1] / 0.7).log_softmax(-1)
        own = logs[range(len(logs)), ids[0, 1:]][len(found.prompt) - 1 :]
        learned = torch.tensor(found.learned)
        seen = torch.tensor(found.logprobs, dtype=torch.float64)
        assert (own[learned] - seen[learned]).abs().max() < 1e-6
        assert (seen[~learned] == 0).all()


def test_rollouts_depend_on_neither_the_batch_nor_the_time_that_tools_take(
    mixed: Talk, drawn: list[Rollout]
):
    apart = [
        *mixed.rollouts("Sums", [mixed.asked(n) for n in range(5)]),
        *mixed.rollouts("Sums", [mixed.asked(n) for n in range(5, 8)]),
    ]
    assert [one.tokens for one in apart] == [one.tokens for one in drawn[:8]]
    assert [one.reward for one in apart] == [one.reward for one in drawn[:8]]
    assert {one.messages[0]["content"] for one in drawn} == {"", "Seven.", BAD}
    assert {measured(one)["turns"] for one in drawn} == {1.0, 2.0}


def test_calls_that_cannot_be_read_or_take_too_long_are_answered(drawn: list[Rollout]):
    bad = next(one for one in drawn if one.messages[0]["content"] == BAD)
    assert bad.messages[1]["role"] == "tool"
    assert bad.messages[1]["content"].startswith("error: the tool call cannot be read")
    assert bad.messages[2]["content"] == "It is four."
    assert measured(bad) == {"turns": 2, "tool_calls": 1, "tool_failures": 1}
    both = next(one for one in drawn if len(one.messages[0].get("tool_calls", ())) == 2)
    assert [m["content"][:6] for m in both.messages[1:3]] == ["4", "error:"]
    assert "longer than 2 s" in both.messages[2]["content"]
    assert both.reward is not None
    plain = next(one for one in drawn if one.messages[0]["content"] == "Seven.")
    assert len(plain.messages) == 1, "an answer without a call ends the conversation"


def test_an_environment_that_fails_loses_its_conversation_and_all_stop_the_run(
    sums: Talk, drawn: list[Rollout]
):
    left = [one for one in drawn if one.failure]
    assert 0 < len(left) < 24
    assert all(one.reward is None and "ended by itself" in one.failure for one in left)
    assert all(one.reward is not None for one in drawn if not one.failure)
    with pytest.raises(LorakitError, match="no board") as failure:
        sums.rollouts("Game", [sums.asked(13)])
    assert failure.value.exit_code == 1
    one, other = sums.rollouts("Game", [sums.asked(13), sums.asked(1)])
    assert (one.tokens, one.reward) == ([], None)
    assert other.reward == 1.0


def test_limits_of_turns_and_tokens_end_a_conversation(sums: Talk):
    [cut, full] = sums.rollouts("Sums", [sums.asked(1, max_new_tokens=n) for n in (1, 20)])
    assert sums.text(cut, sampled=True) == ADD
    assert cut.finish_reason == "length"
    # The result does not fit: it is left out, and the rollout ends where the model stopped.
    assert sums.text(full, sampled=True) == ADD + END
    assert (full.finish_reason, len(full.tokens)) == ("length", 2)
    assert full.reward == 2.0


def test_an_environment_with_steps_answers_and_rewards_each_turn(sums: Talk):
    once, thrice, endless = sums.rollouts("Game", [sums.asked(n) for n in (1, 3, 30)])
    assert sums.text(once, sampled=True) == ADD + END
    assert sums.text(thrice, sampled=True) == (ADD + END) * 3
    assert [m["role"] for m in thrice.messages] == ["assistant", "user"] * 2 + ["assistant"]
    assert thrice.messages[1]["content"] == "Go on. "
    assert thrice.reward == 3.0
    assert measured(thrice)["turn"] == 2.0, "the mean of 1, 2 and 3"
    assert measured(endless)["turns"] == 3
    assert (endless.reward, endless.finish_reason) == (3.0, "stop")


def test_a_turn_reads_only_what_stands_behind_the_turn_before(sums: Talk):
    read: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        read.extend([rows * tokens] if tokens > 1 else [])

    messages = [{"role": "user", "content": "Three and three? " * 4}]  # worth keeping
    asked = replace(sums.asked(3), tokens=prompt_tokens(messages, sums.tokenizer))
    [first] = sums.rollouts("Game", [asked])  # the model is tried once
    handle = sums.model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    try:
        [again] = sums.rollouts("Game", [asked])
    finally:
        handle.remove()
    assert again == first
    assert again.prompt is not None
    # The token that ended a turn is read with what answers it.
    between = again.learned.count(False)
    assert measured(again)["turns"] == 3
    assert sum(read) == len(again.prompt) + between + 2


def test_functions_alone_are_tools(sums: Talk, tmp_path: Path):
    (tmp_path / "tools.py").write_text(
        'def add(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n'
        '        a: one.\n        b: other.\n    """\n    return 40 + a + b\n'
    )
    objective = Grpo(tools=[f"{tmp_path}/tools.py:add"], rewards=["exact_match"])
    with closing(EnvironmentRollouts(objective, sums.tokenizer)) as source:
        [found] = source.write([sums.asked(1)], sums.model, 0)
    assert [m["content"] for m in found.messages] == ["", "44", "It is four."]
    assert found.reward is None


def test_what_cannot_converse_is_refused_before_anything_is_sampled(sums: Talk, tokenizer: Any):
    for name, says in (("Sums", "template"), ("NoReward", "gives no reward")):
        with pytest.raises(InputError, match=says):
            EnvironmentRollouts(Grpo(environment=f"{sums.file}:{name}"), tokenizer)
