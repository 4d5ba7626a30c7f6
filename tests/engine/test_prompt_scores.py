"""Prompts that wait together are scored together, each as by itself; one that fails fails alone."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
import torch

import lorakit
from lorakit.engine.engine import Engine
from lorakit.engine.prompt_scores import PromptScores, Scored
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling
from lorakit.engine.score_all import score_all
from lorakit.engine.training_queue import TrainingQueue
from lorakit.errors import InputError
from lorakit.lora.routing import BASE
from random_adapters import make_adapter


def test_prompts_of_several_adapters_share_passes_and_each_has_what_it_has_alone(
    base: Path, adapters: dict[str, Path], tmp_path: Path
):
    model, tokenizer = lorakit.load_model(str(base), "float32")
    model = model.double()
    with Engine(model, tokenizer, str(base), max_rows=4) as engine:
        for name in ("shop", "few"):
            engine.pool.register(name, adapters[name])
        head = make_adapter(base, tmp_path / "head", r=2, target_modules=["q_proj", "lm_head"])
        engine.pool.register("head", head)
        asked = [
            ([7 * i % 250 for i in range(length)], adapter)
            for length, adapter in [(9, "shop"), (40, None), (2, "few"), (17, "head"), (1, "shop"),
                                    (300, "few"), (5, "head")]
        ]  # fmt: skip
        alone = [engine.score_prompt(*one, 3).result(60) for one in asked]
        passes: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        may_go = Event()
        engine.training.call(None, may_go.wait)
        begun = [engine.score_prompt(*one, 3) for one in asked]
        may_go.set()
        together = [one.result(60) for one in begun]
        handle.remove()
    assert len(passes) == 2  # as many prompts in each as the engine has rows
    for one, wanted in zip(together, alone, strict=True):
        assert _numbers(one) == pytest.approx(_numbers(wanted), abs=1e-9, nan_ok=True)
        assert [[token for token, _ in row] for row in one.rivals] == [
            [token for token, _ in row] for row in wanted.rivals
        ]
    ids, _ = asked[1]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = together[1].logprobs[1:]
    assert found == pytest.approx([float(logs[i, ids[i + 1]]) for i in range(39)], abs=1e-9)


def test_the_pass_over_a_prompt_gives_the_token_behind_it_too(
    start: Callable[..., Engine],
):
    engine = start()
    prompt = list(range(30, 50))
    for adapter in (None, "shop"):
        for drawn in ({}, {"temperature": 0.8, "seed": 5, "scaled_logprobs": True}):
            sampling = Sampling(max_new_tokens=1, logprobs=2, **drawn)
            [wanted] = [*engine.submit(prompt, adapter, sampling)]
            answer = Ticket(tuple(prompt), adapter, sampling)
            engine.score_prompt(prompt, adapter, answer=answer).result(60)
            [found] = [*answer]
            assert found.finish_reason == "length"
            assert [one.token for one in found.logprobs] == [o.token for o in wanted.logprobs]
            numbers = [[o.logprob, *(t.logprob for t in o.top)] for o in found.logprobs]
            expected = [[o.logprob, *(t.logprob for t in o.top)] for o in wanted.logprobs]
            assert numbers[0] == pytest.approx(expected[0], abs=1e-5)


def test_continuations_of_one_context_read_it_once_and_score_as_alone(
    start: Callable[..., Engine],
):
    engine = start()
    contexts = [[(k + 3 * i) % 250 for i in range(60)] for k in (1, 2)]
    prompts = [
        Scored(adapter, [*context, *ending], top=1, begin=60)
        for context in contexts
        for ending in ([7], [8, 9], [10, 11, 12, 13])
        for adapter in (BASE, "shop")
    ]
    read: list[int] = []
    handle = engine.resident.base.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = score_all(engine, prompts)
    handle.remove()
    assert read[-1] < 4 * (60 + 7)  # of each context and adapter, and what is behind it
    for prompt, scores in zip(prompts, found, strict=True):
        name = None if prompt.adapter == BASE else prompt.adapter
        alone = engine.score_prompt(prompt.tokens, name, 1).result(60)
        assert scores.logprobs == pytest.approx(alone.logprobs[60:], abs=1e-4)
        assert [row[0][0] for row in scores.rivals] == [row[0][0] for row in alone.rivals[60:]]
    longest = engine.context_length + 1  # its last token is not read
    [at_the_end] = score_all(engine, [Scored("shop", [5] * longest, begin=longest - 1)])
    assert len(at_the_end.logprobs) == 1
    with pytest.raises(InputError):
        score_all(engine, [Scored("shop", [5] * (longest + 1))])
    with pytest.raises(InputError):
        score_all(engine, [Scored("nobody", [5])])


def _numbers(scores: PromptScores) -> list[float]:
    return [*scores.logprobs, *(value for row in scores.rivals for _, value in row)]


def test_an_item_that_fails_fails_alone_and_an_owner_with_many_leaves_room_to_others():
    queue = TrainingQueue(cast(Any, None), pass_tokens=100)
    calls: list[list[str]] = []

    def work(items: Any) -> list[str]:
        calls.append([*items])
        if "bad" in items:
            raise ValueError("bad")
        return [f"{item} done" for item in items]

    def ask(item: str, owner: str, tokens: int = 10) -> Any:
        return queue.together(work, item, owner=owner, tokens=tokens, most=4)

    many = [ask(f"m{i}", "many") for i in range(6)]
    bad, other = ask("bad", "b"), ask("o", "a")
    queue.tick()
    assert other.result(0) == "o done"
    assert isinstance(bad.exception(0), ValueError)
    assert len(calls[0]) == 4
    assert calls[1:5] == [[item] for item in calls[0]]
    long = ask("long", "c", tokens=60)
    while queue.waiting():
        queue.tick()
    assert ["long"] in calls  # beside others it would be padding
    assert long.result(0) == "long done"
    assert [one.result(0) for one in many] == [f"m{i} done" for i in range(6)]
