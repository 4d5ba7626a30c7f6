"""What is wrong inside an adapter's or a model's files is one line, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.adapters.combine import combine
from lorakit.adapters.diff import diff
from lorakit.adapters.export.mlx import export_mlx
from lorakit.adapters.export.ollama import export_ollama
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.extract import extract
from lorakit.adapters.foreign import import_adapter
from lorakit.adapters.inspect import inspect
from lorakit.adapters.resize import resize
from lorakit.errors import InputError
from random_adapters import make_adapter

WEIGHTS, CONFIG, TEMPLATE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "chat_template.jinja",
)
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Harm = Callable[[Path], object]


def field(name: str, value: Any, file: str = CONFIG) -> Harm:
    """Gives a field of a JSON file another value."""

    def harm(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, name: value}))

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Harm:
    """Changes the tensors of a file in place, or replaces them."""

    def harm(folder: Path) -> None:
        values = load_file(folder / file)
        save_file(change(values) or values, folder / file, metadata={"format": "pt"})

    return harm


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    """Changes one matrix of a model."""
    return tensors(lambda t: {**t, UP: change(t[UP])}, "model.safetensors")


def index(text: str) -> Harm:
    """An index in the place of the only file."""

    def harm(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return harm


ADAPTERS: dict[str, tuple[Harm, str]] = {
    "no tensor": (lambda folder: save_file({}, folder / WEIGHTS), "holds no tensor"),
    "8 bits": (
        tensors(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
        "is float8_e4m3fn, and an adapter is",
    ),
    "whole numbers": (tensors(lambda t: {k: v.int() for k, v in t.items()}), "is int32, and an"),
    "base is a number": (field("base_model_name_or_path", 3), "must be a text, not 3"),
    "base is a list": (field("base_model_name_or_path", [1]), "must be a text, not [1]"),
    "huge rank": (field("r", 10**12), "more than any layer has"),
    "tokens are a text": (field("trainable_token_indices", "x"), "must be numbers of tokens"),
    "tokens are texts": (field("trainable_token_indices", {"a": ["b"]}), "must be numbers of"),
}
VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda bad, good, out: lorakit.merge(bad, out, verify=False),
    "combine": lambda bad, good, out: combine([good, bad], out, weights=[1, 1]),
    "resize": lambda bad, good, out: resize(bad, out, rank=1),
    "inspect": lambda bad, good, out: inspect(bad),
    "diff": lambda bad, good, out: diff(good, bad),
    "export": lambda bad, good, out: export_vllm(bad, out),
}


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "bad")


def refused(tmp_path: Path, words: str, run: Callable[[Path], object]) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        run(tmp_path / "out")
    assert words in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ADAPTERS)
def test_every_verb_refuses_a_damaged_adapter(case: str, good: Path, bad: Path, tmp_path: Path):
    harm, words = ADAPTERS[case]
    harm(bad)
    for run in VERBS.values():
        refused(tmp_path, words, lambda out, run=run: run(bad, good, out))


def test_a_template_that_is_no_text_is_named(good: Path, bad: Path, tmp_path: Path):
    (bad / TEMPLATE).write_bytes(b"\xff\xfe\xff")
    words = f"{TEMPLATE} cannot be read"
    for run in (VERBS["combine"], VERBS["resize"]):
        refused(tmp_path, words, lambda out, run=run: run(bad, good, out))
    refused(tmp_path, words, lambda out: lorakit.merge(bad, out, in_memory=True))
    refused(tmp_path, words, lambda out: export_ollama(bad, out))


def test_a_tensor_that_is_of_no_adapter_is_not_carried_along(good: Path, bad: Path, tmp_path: Path):
    tensors(lambda t: t.update(x=torch.ones(2)))(bad)
    for run in (VERBS["combine"], VERBS["resize"]):
        refused(tmp_path, "holds x, which is not part", lambda out, run=run: run(bad, good, out))


@pytest.mark.parametrize("card", ["---\ntags: [\n---\n", "---\ntags: 3\n---\n", "---\n- a\n---\n"])
def test_a_card_that_cannot_be_read_does_not_stop_an_inspection(card: str, bad: Path):
    (bad / "README.md").write_text(card)
    assert len(inspect(bad).modules) == 14


BASES: dict[str, tuple[Harm, str]] = {
    "a text for a number": (field("hidden_size", "a", "config.json"), "cannot be read: Validation"),
    "no heads": (field("num_attention_heads", 0, "config.json"), "cannot be read"),
    "unknown dtype": (field("dtype", "zzz", "config.json"), "cannot be read"),
    "odd quantisation": (field("quantization_config", 3, "config.json"), "cannot be read"),
    "lacking weights": (
        tensors(lambda t: {k: v for k, v in t.items() if k != UP}, "model.safetensors"),
        f"lacks {UP} in its files",
    ),
    "whole numbers": (weight(lambda W: W.int()), "is stored as I32, and the configuration names"),
    "8 bits": (weight(lambda W: W.to(torch.float8_e5m2)), "is stored as F8_E5M2"),
    "NaN where it is adapted": (weight(lambda W: W.fill_(torch.nan)), f"{UP} holds NaN or Inf"),
    "NaN where nothing is adapted": (
        tensors(lambda t: {**t, NORM: t[NORM] * torch.nan}, "model.safetensors"),
        "NaN or Inf",
    ),
    "index with a long name": (index('{"weight_map": {"a": "%s"}}' % ("x" * 300)), "is missing"),
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("case", BASES)
def test_both_ways_of_merging_refuse_a_damaged_base(
    case: str, in_memory: bool, tiny_model: Path, good: Path, tmp_path: Path
):
    harm, words = BASES[case]
    base = shutil.copytree(tiny_model, tmp_path / "base")
    harm(base)
    options: dict[str, Any] = {"base": str(base), "in_memory": in_memory, "verify": False}
    refused(tmp_path, words, lambda out: lorakit.merge(good, out, **options))


@pytest.mark.parametrize("options", [{"verify": True}, {"in_memory": True}])
def test_a_base_without_tokenizer_is_named(
    options: dict[str, bool], tiny_model: Path, good: Path, tmp_path: Path
):
    base = shutil.copytree(tiny_model, tmp_path / "base", ignore=shutil.ignore_patterns("token*"))
    words = "its tokenizer's files are missing"
    refused(tmp_path, words, lambda out: lorakit.merge(good, out, base=str(base), **options))
    refused(tmp_path, "the tokenizer of", lambda out: export_ollama(good, out, base=str(base)))


def test_a_tokenizer_of_another_form_is_named(tiny_model: Path, good: Path, tmp_path: Path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "tokenizer_config.json").write_text("[1]")
    words = f"the tokenizer in {base} is damaged"
    refused(tmp_path, words, lambda out: lorakit.merge(good, out, base=str(base)))


def test_an_adapter_for_another_width_is_exported_for_nobody(
    tiny_model: Path, good: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.update({"hidden_size": 64, "head_dim": 16})
    base = shutil.copytree(tiny_model, tmp_path / "base")
    type(model)(model.config).save_pretrained(base)
    for export in (export_ollama, export_vllm, export_mlx):
        refused(tmp_path, "another base model", lambda out, e=export: e(good, out, base=str(base)))


def test_extracting_names_the_model_that_is_damaged(tiny_model: Path, tmp_path: Path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weight(lambda W: W.fill_(torch.nan))(other)
    for pair in ((tiny_model, other), (other, tiny_model)):
        words = f"{other}: {UP} holds NaN or Inf"
        refused(tmp_path, words, lambda out, pair=pair: extract(*map(str, pair), out, rank=1))
    field("model_type", "mistral", "config.json")(other)
    words = "only models of one architecture have a difference"
    refused(tmp_path, words, lambda out: extract(str(tiny_model), str(other), out, rank=1))
    field("model_type", "llama", "config.json")(other)
    weight(lambda W: torch.tensor(1.0))(other)
    words = f"{UP} is () and not (48, 32)"
    refused(tmp_path, words, lambda out: extract(str(tiny_model), str(other), out, rank=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 2**70, "method": "dare_linear", "density": 0.5}, "--seed must be a whole number"),
        ({"weights": [1e300, 1]}, "the combination has NaN or Inf: give smaller weights"),
    ],
)
def test_numbers_beyond_all_bounds_are_refused(
    options: dict[str, Any], words: str, good: Path, bad: Path, tmp_path: Path
):
    settings = {"weights": [1, 1], **options}
    refused(tmp_path, words, lambda out: combine([good, bad], out, **settings))


Q = "model.layers.0.self_attn.q_proj"
FOREIGN: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "model is a number": ({}, {"model": 3}, "which is not a string: give --base"),
    "no settings": ({}, {"lora_parameters": [1]}, "must say lora_parameters.scale"),
    "huge scale": ({}, {"lora_parameters": {"scale": 10**400}}, "must say lora_parameters.scale"),
    "8 bits": (
        {f"{Q}.lora_a": torch.ones(32, 2).to(torch.float8_e4m3fn)},
        {},
        "is float8_e4m3fn, and only floats of 16",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_import_refuses_what_means_nothing(case: str, tiny_model: Path, tmp_path: Path):
    changed, settings, words = FOREIGN[case]
    source = tmp_path / "source"
    source.mkdir()
    factors = {f"{Q}.lora_a": torch.ones(32, 2), f"{Q}.lora_b": torch.ones(2, 32), **changed}
    save_file(factors, source / "adapters.safetensors")
    usual = {"model": str(tiny_model), "lora_parameters": {"scale": 2.0}}
    (source / CONFIG).write_text(json.dumps({**usual, **settings}))
    refused(tmp_path, words, lambda out: import_adapter(source, out))


def test_an_import_refuses_settings_without_end_and_an_alpha_of_two(
    tiny_model: Path, tmp_path: Path
):
    key = "lora_" + Q.replace(".", "_")
    factors = {
        f"{key}.lora_down.weight": torch.ones(2, 32),
        f"{key}.lora_up.weight": torch.ones(32, 2),
        f"{key}.alpha": torch.ones(2),
    }
    save_file(factors, tmp_path / "kohya.safetensors")
    source, base = tmp_path / "kohya.safetensors", str(tiny_model)
    refused(tmp_path, "is not a single number", lambda out: import_adapter(source, out, base=base))
    (tmp_path / CONFIG).write_text("[" * 100_000)
    refused(tmp_path, "is not readable JSON", lambda out: import_adapter(source, out, base=base))
