"""What prompts have in common is computed once, and answers are those of reading each by itself."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from answered import alone, tokens
from layer_kinds import FAMILIES, tiny_config
from lorakit.engine import batch as batch_module
from lorakit.engine import prefix_cache
from lorakit.engine.batch import ContinuousBatch
from lorakit.engine.carried import how_carried
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.prefix_cache import PrefixCache
from lorakit.engine.requests import Ticket
from lorakit.engine.rows import AnswerRow
from lorakit.engine.sampler import write_rows
from lorakit.engine.sampling import Ending, Sampling
from lorakit.lora.routing import BASE, Routing
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GREEDY = Sampling(max_new_tokens=12, logprobs=0)
NEW = 5
Asked = Sequence[tuple[Sequence[int], int]]
Written = list[tuple[list[int], list[float]]]
Start = Callable[..., Engine]


def text(seed: int, length: int) -> list[int]:
    return [(7 * i + 31 * seed + i * i * (seed + 1)) % 256 for i in range(length)]


class Model:
    """A tiny model of a family in float64, and how many tokens of prompts it has read."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(3)
        config: Any = tiny_config(family)
        config._experts_implementation = "eager"  # the others take no float64
        self.model: Any = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.inference_mode():
            scale = (
                self.model(input_ids=torch.arange(30)[None], use_cache=False).logits.std().item()
            )
        self.temperature = scale * 0.8  # so that answers differ, whatever the family
        self.carried = how_carried(self.model)
        assert not self.carried.why_not
        self.read = 0
        self.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        self.read += given[0].numel() if given[0].shape[1] > 1 else 0

    def write(self, asked: Asked, rows: int, prefixes: PrefixCache | None = None) -> Written:
        """Tokens and log-probabilities of answers to prompts, each with its seed."""
        made = [
            AnswerRow(
                Ticket(
                    tuple(prompt),
                    None,
                    Sampling(
                        self.temperature, max_new_tokens=NEW + seed % 3, logprobs=0, seed=seed
                    ),
                ),
                BASE,
                None,
                Ending(frozenset()),
                self.model.device,
            )
            for prompt, seed in asked
        ]
        routing = Routing()
        batch = self.carried.batch(self.model, routing, rows, 100, prefixes=prefixes)
        assert isinstance(batch, ContinuousBatch)
        write_rows(batch, made, routing)
        chosen = [[c for piece in row.ticket for c in piece.logprobs] for row in made]
        return [([c.token for c in own], [c.logprob for c in own]) for own in chosen]


def assert_same(found: Written, expected: Written) -> None:
    for (tokens_, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens_ == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)  # states are in float32


@contextmanager
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also few tokens are shared within the block."""
    with monkeypatch.context() as patched:
        patched.setattr(prefix_cache, "LEAST", 4)
        patched.setattr(batch_module, "LEAST", 4)
        patched.setattr(batch_module, "LEAST_ALONE", 4)
        yield


# All positions, a window, an indexer, a state, a window and a state, a state read in one piece.
CHOSEN = ["minicpm3", "gemma3_text", "deepseek_v32", "qwen3_next", "falcon_h1", "jamba"]


@pytest.mark.parametrize("family", few(FAMILIES.keys(), *CHOSEN))
def test_several_answers_to_one_prompt_read_it_once_and_are_those_of_their_seeds(family: str):
    model = Model(family)
    # More answers than rows: some come while others of their prompt write.
    asked = [(text(length, length), seed) for length in (20, 13) for seed in range(5)]
    expected = [model.write([one], 1)[0] for one in asked]
    model.read = 0
    assert_same(model.write(asked, 10), expected)
    assert model.read <= 2 * 20  # the two together, with padding
    model.read = 0
    assert_same(model.write(asked, 4, PrefixCache()), expected)
    assert model.read <= 2 * 20
    assert len({tuple(tokens_) for tokens_, _ in expected}) == len(expected)


@pytest.mark.parametrize("family", few(FAMILIES.keys(), *CHOSEN))
def test_prompts_that_begin_alike_go_on_from_there(family: str, monkeypatch: pytest.MonkeyPatch):
    model, system = Model(family), text(5, 24)
    asked = [([*system, *text(seed, 3 + seed)], seed) for seed in range(6)]
    expected = [model.write([one], 1)[0] for one in asked]
    model.read, cache = 0, PrefixCache()
    with short_beginnings(monkeypatch):
        first = model.write(asked[:3], 2, cache)
        assert_same(first + model.write(asked[3:], 3, cache), expected)
    whole = sum(len(prompt) for prompt, _ in asked)
    if model.carried.in_parts:
        assert cache.queries == whole
        assert cache.hits >= 4 * len(system)
        assert model.read < whole / 2
    else:
        assert cache.hits == 0


@pytest.mark.parametrize("chunk", [7, 40])
@pytest.mark.parametrize("family", ["minicpm3", "qwen3_next"])
def test_beginnings_are_shared_while_long_prompts_are_read_in_parts(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batch_module, "CHUNK", chunk)
    model, system = Model(family), text(5, 24)
    asked = [([*system, *text(seed % 4, 3 + 5 * (seed % 4))], seed) for seed in range(8)]
    asked += [(text(9, 30), 20), (text(9, 30), 21), ([*text(9, 30), 4], 22)]
    expected = [model.write([one], 1)[0] for one in asked]
    cache = PrefixCache(keeps_answers=True)
    with short_beginnings(monkeypatch):
        for rows in (3, 11):
            assert_same(model.write(asked, rows, cache), expected)
    assert cache.hits > cache.queries / 2


def test_short_prompts_are_not_padded_to_long_ones():
    model = Model("minicpm3")
    asked = [(text(seed, length), seed) for seed, length in enumerate((90, 9, 90, 10, 11))]
    expected = [model.write([one], 1)[0] for one in asked]
    model.read = 0
    assert_same(model.write(asked, 5), expected)
    assert model.read <= 2 * 90 + 3 * 11  # and not 5 * 90


def test_a_prompt_that_goes_on_from_an_answer_reads_what_is_new(monkeypatch: pytest.MonkeyPatch):
    for family in ("minicpm3", "mistral"):
        model, cache, first = Model(family), PrefixCache(keeps_answers=True), text(3, 20)
        with short_beginnings(monkeypatch):
            [(answer, _)] = model.write([(first, 1)], 1, cache)
            more = [*first, *answer, *text(4, 6)]
            expected = model.write([(more, 2)], 1)
            cache.hits = 0
            assert_same(model.write([(more, 2)], 1, cache), expected)
        assert cache.hits == len(first) + len(answer) - 1


def test_frequencies_that_depend_on_the_length_share_whole_prompts_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    model = Model("minicpm3")
    model.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    cache, asked = PrefixCache(), [(text(5, 24) + text(s, 3), s) for s in range(3)]
    with short_beginnings(monkeypatch):
        model.write(asked, 1, cache)
        assert cache.hits == 0
        model.write(asked[:1], 1, cache)
    assert cache.hits == 27


def test_memory_is_bounded_and_what_was_used_last_stays(monkeypatch: pytest.MonkeyPatch):
    model = Model("minicpm3")
    one = PrefixCache()
    model.write([(text(1, 20), 1)], 1, one)
    cache = PrefixCache(int(3.5 * one.size))
    with short_beginnings(monkeypatch):
        for seed in (1, 2, 3, 1, 4, 5, 1, 6):
            hits = cache.hits
            model.write([(text(seed, 20), seed)], 1, cache)
            assert 0 < cache.size <= 3.5 * one.size
            assert cache.size == sum(
                node.size for root in cache._roots.values() for node in prefix_cache._below(root)
            )
        model.write([(text(1, 20), 1)], 1, cache)
        assert cache.hits - hits == 20
        hits = cache.hits
        model.write([(text(2, 20), 1)], 1, cache)
        assert cache.hits == hits
    cache.forget(BASE)
    assert cache.size == 0
    small = PrefixCache(100)  # bytes, too few for anything
    twice = [(text(1, 20), 1)] * 2
    assert_same(model.write(twice, 1, small), model.write(twice, 2))
    assert small.size == small.hits == 0


# --- an engine's adapters -------------------------------------------------------------------


def test_adapters_share_no_beginnings_and_each_keeps_its_own(
    start: Start, base: Path, adapters: dict[str, Path]
):
    engine, prompt = start(), text(2, 60)
    names = ["shop", "poet", None]
    expected = [alone(base, n and adapters[n], prompt, 12, [257]) for n in names]
    assert len(set(map(tuple, expected))) == 3
    for known in (0, 60):
        tickets = [engine.submit(prompt, name, GREEDY) for name in names]
        assert [tokens(ticket) for ticket in tickets] == expected
        assert [ticket.cached_tokens for ticket in tickets] == [known] * 3
    # A longer prompt goes on from each adapter's own.
    longer = [*prompt, *text(3, 9)]
    for name in names:
        ticket = engine.submit(longer, name, GREEDY)
        assert tokens(ticket) == alone(base, name and adapters[name], longer, 12, [257])
        assert ticket.cached_tokens == 60
    assert engine.prefixes is not None
    assert engine.prefixes.hits == 3 * 60 * 2


def test_a_new_version_of_an_adapter_knows_nothing_of_the_old_one(
    start: Start, base: Path, adapters: dict[str, Path], tmp_path: Path
):
    engine, prompt = start(), text(2, 60)
    old = tokens(engine.submit(prompt, "shop", GREEDY))
    other = make_adapter(base, tmp_path / "other", 77, r=4)
    engine.pool.register("shop", other)
    ticket = engine.submit(prompt, "shop", GREEDY)
    assert tokens(ticket) == alone(base, other, prompt, 12, [257]) != old
    assert ticket.cached_tokens == 0


@pytest.mark.parametrize("together", [False, True])
def test_a_salt_shares_beginnings_with_its_own_requests_alone(
    start: Start, base: Path, adapters: dict[str, Path], together: bool
):
    engine, prompt = start(), text(2, 60)
    expected = alone(base, adapters["shop"], prompt, 12, [257])
    salts = ["", "a", "b", "a", ""]
    tickets = []
    for salt in salts:
        tickets.append(engine.submit(prompt, "shop", replace(GREEDY, cache_salt=salt)))
        if not together:
            assert tokens(tickets[-1]) == expected
    if together:
        assert [tokens(ticket) for ticket in tickets] == [expected] * 5
    assert [ticket.cached_tokens for ticket in tickets] == [0, 0, 0, 60, 60]
    longer = [*prompt, *text(3, 9)]
    tickets = [engine.submit(longer, "shop", replace(GREEDY, cache_salt=s)) for s in ("b", "c")]
    assert tokens(tickets[0]) == tokens(tickets[1])
    assert [ticket.cached_tokens for ticket in tickets] == [60, 0]


def test_answers_are_those_of_an_engine_without_a_cache(start: Start):
    prompts = [[*text(1, 50), *text(seed, 5 + seed)] for seed in range(5)]
    hot = Sampling(temperature=1.0, max_new_tokens=9, seed=3, logprobs=2)
    found = []
    for options in ({}, {"prefix_bytes": 0}):
        engine = start(**options)
        asked = [(prompt, name) for prompt in prompts for name in ("shop", "mixed", None)]
        tickets = [engine.submit(*one, hot) for one in asked * 2]
        found.append([[c for piece in ticket for c in piece.logprobs] for ticket in tickets])
        assert (engine.prefixes is None) == bool(options)
        assert any(ticket.cached_tokens for ticket in tickets) or options
    for kept, computed in zip(*found, strict=True):
        assert [c.token for c in kept] == [c.token for c in computed]
        for one, other in zip(kept, computed, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_log_probabilities_of_a_prompt_that_is_known_are_all_there(start: Start):
    engine, prompt = start(), text(2, 60)
    before = engine.score_prompt(prompt, "shop").result().logprobs
    tokens(engine.submit(prompt, "shop", GREEDY))
    after = engine.score_prompt(prompt, "shop").result().logprobs
    assert math.isnan(after[0])
    assert after[1:] == before[1:]
    assert len(after) == 60


def test_one_answer_that_leaves_or_fails_leaves_the_others_of_its_prompt_right(
    start: Start, base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batch_module, "CHUNK", 20)
    engine = start()
    for seed in range(3):
        asked = text(10 + seed, 60)
        expected = alone(base, adapters["shop"], asked, 12, [257])
        tickets = [engine.submit(asked, "shop", GREEDY) for _ in range(6)]
        tickets[seed].cancel()
        kept = [t for t in tickets if t is not tickets[seed]]
        assert [tokens(ticket) for ticket in kept] == [expected] * 5
    # A forward that fails once is made again by the next row.
    failed: list[int] = []

    def fail_once(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[1] > 1 and not failed:
            failed.append(1)
            raise RuntimeError("once")

    engine._model.get_submodule("model.layers.1").register_forward_pre_hook(fail_once)
    asked = text(20, 60)
    tickets = [engine.submit(asked, "poet", GREEDY) for _ in range(3)]
    ends = [list(ticket)[-1].finish_reason for ticket in tickets]
    assert ends.count("error") == 1
    assert failed


def test_windows_that_hold_all_that_a_row_may_have_are_as_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(3)
    config = tiny_config("mistral")
    config.sliding_window = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with short_beginnings(monkeypatch):
        engine = open_engine(str(tmp_path), {}, dtype="float32", max_rows=2)
    with closing(engine):
        for seed in range(3):
            prompt = [*text(1, 70), *text(seed, 9)]
            ticket = engine.submit(prompt, None, GREEDY)
            assert tokens(ticket) == alone(tmp_path, None, prompt, 12, [257])
        assert ticket.cached_tokens == 70
        assert not engine._answers.batch._cache.needs_snapshots  # type: ignore[attr-defined]
