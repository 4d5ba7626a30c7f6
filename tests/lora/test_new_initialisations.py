"""A new initialisation is one registration: the train verb, files and reloading follow it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.cli.main import app
from lorakit.lora.init import (
    DataPass,
    Factors,
    Initialization,
    InitSite,
    initialization,
    register,
)
from lorakit.lora.init.observing import observed
from small_runs import recipe


@pytest.fixture
def names() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(initialization._KNOWN)
    yield
    initialization._KNOWN.clear()
    initialization._KNOWN.update(before)


def first_rows(site: InitSite) -> Factors:
    """The first rows of `W`, chosen by unit columns."""
    return Factors(site.W[: site.r], torch.eye(site.W.shape[0], site.r))


def mean_inputs(data: DataPass) -> dict[str, torch.Tensor]:
    """The mean input (d_in,) of each module over the batches."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in data.modules}
    with observed(data.modules, lambda path, x: seen[path].append(x.detach().mean((0, 1)))):
        for batch in data.batches:
            data.run(batch)
    return {path: torch.stack(means).mean(0) for path, means in seen.items()}


def along_the_mean(site: InitSite) -> Factors:
    assert site.data is not None
    A = torch.zeros(site.r, site.W.shape[1])
    A[0] = site.data
    return Factors(A, torch.zeros(site.W.shape[0], site.r))


def train(base: Path, rows: Path, output: Path, how: str) -> None:
    values = recipe(base, rows, output, learning_rate=1e-3)
    values["lora"]["init_lora_weights"] = how
    (output.parent / "recipe.json").write_text(json.dumps(values), encoding="utf-8")
    app(["train", str(output.parent / "recipe.json")], standalone_mode=False)


def reloaded(base: Path, folder: Path) -> tuple[lorakit.LoraModel, torch.Tensor]:
    model = lorakit.load_model(str(base), dtype="float32")
    model = model[0] if isinstance(model, tuple) else model
    adapted = lorakit.PeftModel.from_pretrained(model, folder)
    return adapted, torch.tensor([[5, 6, 7, 8]])


def test_a_new_start_from_the_weight_trains_and_is_read_again(tiny_model, rows, tmp_path, names):
    register(Initialization(value="first_rows", make=first_rows, subtracted=True, repeatable=True))
    train(tiny_model, rows, tmp_path / "out", "first_rows")
    model, ids = reloaded(tiny_model, tmp_path / "out")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    initial = layer.lora_initial["default"]
    assert torch.equal(initial.A, layer.base_layer.weight[:4])
    A, _ = layer.matrices("default")
    assert 0 < (A - initial.A).abs().max() < 0.1  # trained from there
    with torch.no_grad():
        adapted = model(ids).logits
        layers = [m for m in model.modules() if hasattr(m, "lora_initial")]
        merged = model.merge_and_unload()(ids).logits
    assert len(layers) > 2
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_a_new_start_from_data_trains_and_is_read_again(tiny_model, rows, tmp_path, names):
    register(Initialization(value="mean_input", make=along_the_mean, collect=mean_inputs))
    train(tiny_model, rows, tmp_path / "out", "mean_input")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A = saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert A[0].norm() > 10 * A[1:].norm()  # zero at the start
    model, ids = reloaded(tiny_model, tmp_path / "out")
    own = model.adapter_tensors("default")
    assert all(torch.equal(own[key].detach(), tensor) for key, tensor in saved.items())
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("how", ["eva", "corda", "lora_ga"])
def test_a_recipe_starts_from_data(tiny_model, rows, tmp_path, how):
    train(tiny_model, rows, tmp_path / "out", how)
    model, ids = reloaded(tiny_model, tmp_path / "out")
    assert model.peft_config["default"].init_lora_weights == how
    layers = [m for m in model.modules() if hasattr(m, "lora_initial")]
    assert any(layer.lora_initial for layer in layers) == (how != "eva")
    if how == "eva":
        assert sum(layer.r["default"] for layer in layers) % 4 == 0
    assert model(ids).logits.isfinite().all()
