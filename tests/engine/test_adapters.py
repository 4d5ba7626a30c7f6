"""Adapters of an engine: checked when they come, versioned, kept in memory up to a limit."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit
from answered import alone, text, tokens
from lorakit.adapters.manifest import Derivation
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.models.fingerprint import fingerprint
from random_adapters import make_adapter
from tiny import save_tiny_model

Start = Callable[..., Engine]
GREEDY = Sampling(max_new_tokens=12, logprobs=0)
PROMPT = list(range(30, 50))


def test_a_new_version_is_published_while_those_who_have_the_old_one_finish_on_it(
    start: Start, base: Path, adapters: dict[str, Path], tmp_path: Path
):
    engine = start(adapters={}, max_rows=1)
    folder = Path(shutil.copytree(adapters["shop"], tmp_path / "mine"))
    first = engine.pool.register("mine", folder)
    long = Sampling(max_new_tokens=100, logprobs=0)
    running = engine.submit(PROMPT, "mine", long)
    waiting = engine.submit(PROMPT, "mine", GREEDY)
    shutil.rmtree(folder)
    shutil.copytree(adapters["poet"], folder)
    second = engine.pool.register("mine", folder)
    new = engine.submit(PROMPT, "mine", GREEDY)
    old = alone(base, adapters["shop"], PROMPT, 100, [257])
    assert tokens(running) == old
    assert tokens(waiting) == old[:12]
    assert tokens(new) == alone(base, adapters["poet"], PROMPT, 12, [257]) != old[:12]
    assert (first.version, second.version) == (1, 2)
    assert (first.rank, second.rank) == (4, 3)


def test_weights_are_laid_out_anew_in_parts_beside_answers_that_are_written(
    start: Start, base: Path, adapters: dict[str, Path]
):
    engine, model = start(), AutoModelForCausalLM.from_pretrained(base)
    layers = [layer for layer in engine._model.modules() if type(layer) is nn.Linear]
    steps: list[tuple[int, ...]] = []

    def note(*_: Any) -> None:
        steps.append(tuple(layer.weight.data_ptr() for layer in layers))

    engine._model.get_input_embeddings().register_forward_pre_hook(note)
    running = iter(engine.submit(PROMPT, None, Sampling(max_new_tokens=150, logprobs=0)))
    first = next(running)
    joining = {name: engine.submit(PROMPT, name, GREEDY) for name in ("shop", "few", "mixed")}
    for name, ticket in joining.items():
        assert tokens(ticket) == alone(base, adapters[name], PROMPT, 12, [257])
    written = [chosen.token for piece in (first, *running) for chosen in piece.logprobs]
    assert written == alone(base, None, PROMPT, 150, [257])
    moved = [
        sum(
            layer.weight.nbytes
            for layer, old, new in zip(layers, before, after, strict=True)
            if old != new
        )
        for before, after in pairwise(steps)
    ]
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(moved) > size / 4
    assert max(moved) <= size / 16 + 3 * max(layer.weight.nbytes for layer in layers)
    assert sum(map(bool, moved)) > 4


def test_who_has_an_adapter_that_is_unregistered_finishes(
    start: Start, base: Path, adapters: dict[str, Path]
):
    engine = start(max_rows=1)
    tickets = [engine.submit(PROMPT, "few", GREEDY) for _ in range(3)]
    engine.pool.unregister("few")
    with pytest.raises(InputError, match="no model 'few'"):
        engine.submit(PROMPT, "few")
    with pytest.raises(InputError, match="no model 'few'"):
        engine.pool.unregister("few")
    expected = alone(base, adapters["few"], PROMPT, 12, [257])
    assert [tokens(ticket) for ticket in tickets] == [expected] * 3
    assert [info.name for info in engine.pool.infos()] == ["shop", "poet", "mixed"]


def test_adapters_over_the_limit_are_read_again_when_they_are_asked_for(
    start: Start, base: Path, adapters: dict[str, Path]
):
    sizes = {info.name: info.size for info in start().pool.infos()}
    engine = start(pool_bytes=sizes["poet"] + sizes["mixed"])
    # The largest last, which would not leave room for another.
    loaded = [info.name for info in engine.pool.infos() if info.loaded]
    assert loaded == ["mixed"] or sum(sizes[name] for name in loaded) <= (
        sizes["poet"] + sizes["mixed"]
    )
    for name in (*adapters, *adapters):
        assert tokens(engine.submit(PROMPT, name, GREEDY)) == alone(
            base, adapters[name], PROMPT, 12, [257]
        )
        loaded = [info.name for info in engine.pool.infos() if info.loaded]
        assert name in loaded
        assert len(loaded) == 1 or sum(map(sizes.__getitem__, loaded)) <= (
            sizes["poet"] + sizes["mixed"]
        )


def test_a_folder_that_changed_unseen_is_not_taken_for_the_adapter_it_was(
    start: Start, adapters: dict[str, Path], tmp_path: Path
):
    folders = {
        name: Path(shutil.copytree(adapters[name], tmp_path / name)) for name in ("shop", "few")
    }
    engine = start(adapters=folders, pool_bytes=1)  # so that only the last one stays
    shutil.copy(adapters["poet"] / "adapter_model.safetensors", folders["shop"])
    with pytest.raises(InputError, match="has changed since shop was loaded: load it again"):
        engine.submit(PROMPT, "shop")
    shutil.rmtree(folders["shop"])
    with pytest.raises(InputError, match="has changed since shop was loaded"):
        engine.submit(PROMPT, "shop")
    assert text(engine.submit(PROMPT, "few", Sampling(max_new_tokens=2)))


def test_more_adapters_than_rows_take_turns(start: Start, base: Path, tmp_path: Path):
    folders = {f"n{i}": make_adapter(base, tmp_path / f"n{i}", i, r=1 + i) for i in range(6)}
    engine = start(adapters=folders, max_rows=2)
    for _ in range(2):
        tickets = {name: engine.submit(PROMPT, name, GREEDY) for name in folders}
        for name, ticket in tickets.items():
            assert tokens(ticket) == alone(base, folders[name], PROMPT, 12, [257])
    assert len(engine._bank.adapters) <= 2
    # Ranks 5 and 6 are the most that two have at once, gaps between them included.
    assert engine._bank.packed is not None
    assert engine._bank.packed.columns <= 6 + 5 + 4


def test_an_adapter_answers_with_the_template_and_the_end_that_it_was_trained_with(
    start: Start, adapters: dict[str, Path], tmp_path: Path
):
    folder = Path(shutil.copytree(adapters["shop"], tmp_path / "own"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|pad|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    engine = start(adapters={**adapters, "own": folder})
    assert engine.tokenizer_of("own").chat_template == template
    assert engine.tokenizer_of("shop").chat_template == engine.tokenizer.chat_template != template
    assert engine.tokenizer_of(None) is engine.tokenizer
    end = engine.tokenizer.pad_token_id
    assert end in engine.pool.version("own").ending.tokens
    assert end not in engine.pool.version("shop").ending.tokens


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "lora_only"}, "trains the base's biases"),
    "all biases": ({"bias": "all"}, "trains the base's biases"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of the base"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_the_base_itself_is_refused_with_advice(
    start: Start, base: Path, tmp_path: Path, kind: str
):
    config, words = KINDS[kind]
    model_folder = base
    if "bias" in kind:
        changed = AutoConfig.from_pretrained(base, attention_bias=True)
        model_folder = Path(shutil.copytree(base, tmp_path / "biased"))
        AutoModelForCausalLM.from_config(changed).save_pretrained(model_folder)
    folder = make_adapter(model_folder, tmp_path / kind, **config)
    engine = start()
    with pytest.raises(InputError, match=rf"{words}.*merge it with lorakit merge.*--merged"):
        engine.pool.register(kind, folder)
    assert text(engine.submit(PROMPT, "shop", Sampling(max_new_tokens=2)))
    # By itself it is served, merged into the base.
    merged = open_engine(str(model_folder), {kind: folder}, dtype="float32", merged=True)
    try:
        assert merged.model_name == kind
        assert tokens(merged.submit(PROMPT, None, GREEDY)) == alone(
            model_folder, folder, PROMPT, 12, [257]
        )
        with pytest.raises(InputError, match="is merged into the model, which serves nothing else"):
            merged.pool.register("shop", folder)
    finally:
        merged.close()


def test_adapters_of_another_base_or_damaged_are_refused_and_harm_none(
    start: Start, adapters: dict[str, Path], tmp_path: Path
):
    other = make_adapter(save_tiny_model(tmp_path / "wide", 64), tmp_path / "other")
    cut = Path(shutil.copytree(adapters["shop"], tmp_path / "cut"))
    whole = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    engine = start()
    running = engine.submit(PROMPT, "shop", GREEDY)
    for folder, words in (
        (other, "does not fit .* adapter for another base model"),
        (cut, "adapter_model.safetensors"),
        (tmp_path / "none", "none"),
    ):
        with pytest.raises(InputError, match=words):
            engine.pool.register("new", folder)
        with pytest.raises(InputError, match=words):
            engine.pool.register("shop", folder)
    with pytest.raises(InputError, match="cannot be named"):
        engine.pool.register(engine.model_name, adapters["few"])
    assert tokens(running) == tokens(engine.submit(PROMPT, "shop", GREEDY))
    assert {info.name: info.version for info in engine.pool.infos()}["shop"] == 1


def test_an_adapter_that_was_trained_on_other_weights_is_served_with_a_notice(
    start: Start, base: Path, tmp_path: Path
):
    other = Path(shutil.copytree(base, tmp_path / "tuned"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += torch.ones(())
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    far = make_adapter(other, tmp_path / "far")
    model, _ = lorakit.load_model(str(other), "float32")
    record = Derivation(made_by="resize", sources=[], base_fingerprint=fingerprint(model))
    (far / "lorakit.json").write_text(record.model_dump_json())
    engine = start(adapters={"far": far})
    (notice,) = engine.notices
    assert "was trained on other weights than those of" in notice
    assert text(engine.submit(PROMPT, "far", Sampling(max_new_tokens=2)))


def test_the_base_is_what_the_adapters_were_trained_on(
    base: Path, adapters: dict[str, Path], tmp_path: Path
):
    engine = open_engine(None, {"shop": adapters["shop"]}, dtype="float32")
    engine.close()
    assert engine.model_name == str(base)
    other = make_adapter(save_tiny_model(tmp_path / "second"), tmp_path / "other")
    with pytest.raises(InputError, match=r"for different bases .*shop for .*other for"):
        open_engine(None, {"shop": adapters["shop"], "other": other})
    with pytest.raises(InputError, match="nothing to serve"):
        open_engine(None, {})
    with pytest.raises(InputError, match="merged serves one adapter, not 0"):
        open_engine(str(base), {}, merged=True)
