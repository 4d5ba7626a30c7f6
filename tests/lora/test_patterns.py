"""Patterns out of files match what PEFT's expressions match, and never take long."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorakit.adapters.diff import diff
from lorakit.adapters.inspect import inspect
from lorakit.adapters.merge import merge
from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.patterns import (
    TimeLeft,
    endings,
    first_match,
    layer_index,
    matches_key,
    matches_whole,
    without_match,
)
from random_adapters import make_adapter

NAMES = [
    "q_proj",
    "xq_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.layersX1.self_attn.q_proj",
    "model.visual.blocks.2.attn.qkv",
    "model.layers.3.mlp.experts.7.up_proj",
    "модель.layers.1.q_proj",
]
PARTS = [
    *("q_proj", "k_proj", "layers", "self_attn", "1", "model", "a", "q", "up"),
    *(r"\.", ".", ".*", ".+?", r"\d+", r"\d{1,2}", r"[^.]*", r"[a-q_]+", r"\w+", r"\b", "^", "$"),
    *(
        r"(?:q|k)",
        r"(self_attn|mlp)",
        r"(?!.*visual)",
        r"(?=.*proj)",
        r"(q)?",
        r"\\",
        r"\-",
        "_{,2}",
    ),
    *("(?i:Q)", r"[[:alpha:]]", r"(?<!x)", r"\Z", r"(?P<n>q).*", r"x{2}", "é", r"\s*", r"(l)\w*"),
]
patterns = st.lists(st.sampled_from([*PARTS, "|"]), min_size=1, max_size=5).map("".join)
EVIL = {
    "nested repetitions": "(([a-z_.]*)*)*#",
    "many alternatives": "(.|.)*(.|.)*(.|.)*#",
    "lookahead": "(?=((.*)*)*#)x",
    "backreference": r"((.*)*)*\2#",
    "a slow class": "(?i)(?=a)" + r"[\x00-\U0010ffff]" * 400,
    "counts of counts": "(?=m)(?:(?:.?){900}){900}#",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter limit than the usual one: that there is one is what is tested."""
    monkeypatch.setattr("lorakit.lora.patterns._SECONDS_EACH", 0.3)


def outcome(action: Callable[[], object]) -> object:
    """What an action returns, or the message of its error."""
    try:
        return action()
    except InputError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=3 * settings.default.max_examples)
@given(patterns)
def test_every_way_of_matching_is_that_of_pefts_expressions(pattern: str):
    for name in NAMES:
        try:
            key = re.match(rf"(.*\.)?({pattern})$", name)
            whole = re.fullmatch(pattern, name)
            index = re.match(rf"(?:.*?\.)?(?:{pattern})\.(?P<index>\d+)\.", name)
        except re.error:
            return
        assert matches_key(pattern, name) == (key is not None)
        assert matches_whole(pattern, name) == (whole is not None)
        assert layer_index(pattern, name) == (int(index["index"]) if index else None)


@given(st.lists(st.sampled_from([*NAMES, *map(re.escape, NAMES), "q.proj", "^q_proj", ".*q_proj"])))
def test_the_first_of_many_patterns_is_the_one_that_peft_takes(drawn: list[str]):
    keys = list(dict.fromkeys(drawn))
    for name in NAMES:
        wanted = next((k for k in keys if re.match(rf"(.*\.)?({k})$", name)), None)
        assert first_match(keys, name) == wanted
    unused = [k for k in keys if not any(re.match(rf"(.*\.)?({k})$", n) for n in NAMES)]
    assert sorted(set(without_match(keys, NAMES))) == sorted(set(unused))


def test_endings_are_what_a_name_in_target_modules_may_be():
    assert list(endings("a.b.c")) == ["a.b.c", "b.c", "c"]


@pytest.mark.parametrize("pattern", ["[", "*a", "(a|b", r"\1", "(?<=a*)b"])
def test_what_is_no_expression_is_refused(pattern: str):
    with pytest.raises(InputError, match="not a regular expression"):
        matches_whole(pattern, "model.q_proj")
    with pytest.raises(InputError, match="rank_pattern"):
        LoraConfig(rank_pattern={pattern: 3})


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("pattern", EVIL.values(), ids=EVIL)
def test_no_pattern_takes_longer_than_its_limit(pattern: str):
    name = "model.layers.0.self_attn." + "a" * 200
    began = time.monotonic()
    for match in (matches_whole, matches_key, layer_index):
        said = outcome(lambda match=match: match(pattern, name))  # type: ignore[misc]
        assert not said or "too long" in str(said) or "not a regular" in str(said)
    assert time.monotonic() - began < 20


def test_many_slow_patterns_of_one_configuration_share_one_limit():
    left = TimeLeft(0.1)
    slow = (f"(?=a)(a?){{15}}a{{15}}{n}#" for n in range(100_000))
    began = time.monotonic()
    with pytest.raises(InputError, match="too long"):
        sum(matches_whole(pattern, "a" * 15, left) for pattern in slow)
    assert time.monotonic() - began < 20


def test_thousands_of_modules_and_patterns_are_quick():
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(40) for e in range(50)]
    began = time.process_time()
    ranks = {f"^{re.escape(name)}": 3 for name in names}
    config = LoraConfig(rank_pattern=ranks, alpha_pattern={".*experts.1.up_proj": 2})
    assert {config.rank_for(name) for name in names} == {3}
    assert sum(config.alpha_for(name) == 2 for name in names) == 40
    assert time.process_time() - began < 5


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("a") / "a", target_modules=["q_proj"])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "field", ["rank_pattern", "alpha_pattern", "target_modules", "layers_pattern"]
)
def test_a_verb_ends_in_seconds_whatever_the_adapters_pattern_is(
    adapter: Path, tiny_model: Path, tmp_path: Path, field: str
):
    file = adapter / "adapter_config.json"
    before = file.read_text()
    pattern = EVIL["lookahead"]
    value: object = {pattern: 7} if field.endswith("_pattern") and field[0] in "ra" else pattern
    values = json.loads(before) | {field: value}
    if field == "layers_pattern":
        values |= {"layers_to_transform": [0]}
    verbs: list[Callable[[], object]] = [
        lambda: inspect(adapter, base=str(tiny_model)),
        lambda: merge(adapter, tmp_path / "merged", base=str(tiny_model)),
    ]
    if field in ("rank_pattern", "alpha_pattern"):
        verbs.append(lambda: diff(adapter, adapter))
    file.write_text(json.dumps(values))
    try:
        for verb in verbs:
            began = time.monotonic()
            said = str(outcome(verb))
            assert "too long" in said  # as an error, or as why it does not fit
            assert time.monotonic() - began < 15
    finally:
        file.write_text(before)
    assert not (tmp_path / "merged").exists()


def test_an_expression_with_lookahead_still_adapts_what_it_means():
    model = nn.ModuleDict({"visual": nn.ModuleDict({"q": nn.Linear(2, 2)}), "q": nn.Linear(2, 2)})
    from lorakit.lora.targets import resolve_targets

    assert resolve_targets(model, LoraConfig(target_modules=r"^(?!visual).*q")) == ["q"]
