"""Adapters as other programs leave them: names with wrappers' parts, whole dumps, older pickles."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.adapters.updates import read_updates
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from random_adapters import make_adapter

WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "a"
    targets = ["q_proj", "down_proj", "embed_tokens"]
    return make_adapter(tiny_model, folder, target_modules=targets, use_dora=True)


def base(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(30)[None] * 7 % 259).logits


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def named(key: str) -> str:
    for factor in ("lora_A", "lora_B"):
        key = key.replace(f"{factor}.weight", f"{factor}.default.weight")
    for tensor in ("lora_embedding_A", "lora_embedding_B"):
        key = key.replace(tensor, f"{tensor}.default")
    return key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")


NAMES: dict[str, Callable[[Tensors], Tensors]] = {
    "DDP around the whole": renamed(lambda key: f"module.{key}"),
    "DDP around the base": renamed(
        lambda key: key.replace("base_model.model.", "base_model.model.module.")
    ),
    "compiled": renamed(
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")
    ),
    "a compiled block": renamed(lambda key: key.replace("layers.1.", "layers.1._orig_mod.")),
    "FSDP": renamed(lambda key: key.replace("layers.1.", "_fsdp_wrapped_module.layers.1.")),
    "the adapter's name": renamed(named),
    "all of it": renamed(lambda key: f"module._orig_mod.{named(key)}"),
    "no prefix": renamed(lambda key: key.removeprefix("base_model.model.")),
    "a whole dump": lambda tensors: {
        **renamed(named)(tensors),
        "base_model.model.model.norm.weight": torch.ones(32),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(32, 32),
    },
}


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_wrappers_names_mean_what_peft_means(
    good: Path, tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
):
    folder = shutil.copytree(good, tmp_path / "a")
    save_file(change(load_file(good / WEIGHTS)), folder / WEIGHTS)
    expected = logits(LoraModel.from_pretrained(base(tiny_model), good))
    assert torch.equal(logits(LoraModel.from_pretrained(base(tiny_model), folder)), expected)
    assert read_updates(folder).updates.keys() == read_updates(good).updates.keys()


def test_what_of_a_dump_is_left_out_is_counted_and_two_adapters_are_refused(
    good: Path, tmp_path: Path
):
    folder = shutil.copytree(good, tmp_path / "a")
    save_file(NAMES["a whole dump"](load_file(good / WEIGHTS)), folder / WEIGHTS)
    with pytest.warns(UserWarning, match="2 tensors of the base model are left out"):
        read_updates(folder)
    tensors = renamed(named)(load_file(good / WEIGHTS))
    other = {key.replace(".default", ".other"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | other, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"2 adapters in one file \(default, other\)"):
        read_updates(folder)
    plain = load_file(good / WEIGHTS)
    save_file(plain | {f"module.{k}": t.clone() for k, t in plain.items()}, folder / WEIGHTS)
    with pytest.raises(InputError, match="mean the same"):
        read_updates(folder)


@pytest.mark.exhaustive
def test_a_model_that_was_compiled_first_saves_pefts_names(tiny_model: Path, tmp_path: Path):
    config = lorakit.LoraConfig(
        r=2,
        target_modules=r"model\.layers\.\d\.self_attn\.(q|v)_proj",
        rank_pattern={"^model.layers.0.self_attn.q_proj": 3},
        init_lora_weights=False,
        modules_to_save=["lm_head"],
        bias="all",
    )
    torch.manual_seed(0)
    plain = lorakit.get_peft_model(base(tiny_model), config)
    torch.manual_seed(0)
    compiled = lorakit.get_peft_model(
        torch.compile(base(tiny_model), backend="eager"),  # type: ignore[arg-type]
        config,
    )
    assert compiled.adapter_tensors("default").keys() == plain.adapter_tensors("default").keys()
    assert torch.equal(logits(compiled), logits(plain))
    compiled.save_pretrained(tmp_path / "a")
    loaded = LoraModel.from_pretrained(base(tiny_model), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(plain))
    again = LoraModel.from_pretrained(
        torch.compile(base(tiny_model), backend="eager"),  # type: ignore[arg-type]
        tmp_path / "a",
    )
    assert torch.equal(logits(again), logits(plain))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plain))
    assert not [name for name, _ in merged.named_modules() if "lora" in name]


class Trap:
    """What a pickle of it would do when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


def test_tensors_of_a_pickle_are_read_and_nothing_else_is(
    good: Path, tiny_model: Path, tmp_path: Path
):
    folder = shutil.copytree(good, tmp_path / "a")
    (folder / WEIGHTS).unlink()
    old, tensors = folder / "adapter_model.bin", load_file(good / WEIGHTS)
    expected = logits(LoraModel.from_pretrained(base(tiny_model), good))
    for zipped in (True, False):
        torch.save(tensors, old, _use_new_zipfile_serialization=zipped)
        assert torch.equal(logits(LoraModel.from_pretrained(base(tiny_model), folder)), expected)
    lorakit.merge(folder, tmp_path / "merged", base=str(tiny_model), verify=False)
    from lorakit.adapters.inspect import inspect

    assert inspect(folder, base=str(tiny_model)).fit.fits  # type: ignore[union-attr]
    mark = tmp_path / "sprung"
    with old.open("wb") as file:
        pickle.dump({"x": Trap(mark)}, file)
    with pytest.raises(InputError, match="more than tensors"):
        read_updates(folder)
    for bad, words in (
        ({"x": Trap(mark)}, "more than tensors"),
        ([torch.ones(2)], "tensors by name"),
        ({}, "no tensor"),
        ({"a": torch.ones(2).to_sparse()}, "tensors by name"),
    ):
        torch.save(bad, old)
        with pytest.raises(InputError, match=words):
            read_updates(folder)
    assert not mark.exists()
    torch.save(tensors, old)
    whole = old.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        old.write_bytes(damaged)
        with pytest.raises(InputError) as error:
            read_updates(folder)
        assert "weights_only=False" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "alpha", "scaling"),
    [
        ({"lora_layers": 16, "lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, None, 20),
        ({"lora_parameters": {"rank": 8, "alpha": 4, "scale": 3}}, None, 1.5),
        ({"num_layers": 16, "lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, None, 10),
        ({"num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}, None, 20),
        ({"num_layers": 16, "lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}}, 24, 3),
    ],
)
def test_mlx_lms_settings_give_the_strength_that_its_version_used(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], alpha: float | None, scaling: float
):
    q = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(32, 8), torch.randn(8, 32)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"model": str(tiny_model), **settings})
    )
    for file in ("adapters.safetensors", "adapters.npz"):
        out = tmp_path / f"from-{file}"
        if file.endswith("npz"):
            import numpy as np

            (tmp_path / "adapters.safetensors").unlink()
            np.savez(tmp_path / file, **{f"{q}.lora_a": a.numpy(), f"{q}.lora_b": b.numpy()})
        else:
            save_file({f"{q}.lora_a": a, f"{q}.lora_b": b}, tmp_path / file)
        imported = lorakit_import(tmp_path, out, alpha=alpha)
        assert read_updates(out).updates[q].scaling == pytest.approx(scaling)
        both = "alpha" in settings["lora_parameters"] and alpha is None
        assert bool(imported.notices) == both


def lorakit_import(source: Path, output: Path, **options: Any) -> Any:
    from lorakit.adapters.foreign import import_adapter

    return import_adapter(source, output, **options)
