"""An inspection says what is in the folder, and whether it fits a base, without loading one."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.adapters.inspect import inspect
from lorakit.errors import InputError
from random_adapters import change, make_adapter
from tiny import save_tiny_encoder, save_tiny_model


def test_numbers_are_those_of_the_updates(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(
        tiny_model,
        tmp_path / "a",
        use_rslora=True,
        lora_alpha=6,
        rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
    )
    found = inspect(adapter)
    deltas = change(tiny_model, adapter)
    assert len(found.modules) == 14
    for module in found.modules:
        delta = deltas[f"{module.path}.weight"]
        assert module.shape == tuple(delta.shape)
        assert module.norm == pytest.approx(delta.norm().item(), rel=1e-4)
        assert module.r == (2 if "q_proj" in module.path else 4)
        assert module.scaling == pytest.approx(6 / module.r**0.5)
        assert 1 <= module.directions <= module.r
        assert 1 < module.effective_rank <= module.r
    stored = load_file(adapter / "adapter_model.safetensors")
    assert found.parameters == sum(t.numel() for t in stored.values())
    assert [w.key for w in found.whole] == ["lm_head.weight"]
    assert found.dtypes == {"float32": len(stored)}
    assert found.base_model == str(tiny_model)
    assert json.loads(json.dumps(found.to_dict()))["r"] == 4


def test_pefts_adapters_say_so_and_lorakits_runs_say_their_main_facts(
    tiny_model: Path, tmp_path: Path
):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "theirs"
    )
    found = inspect(tmp_path / "theirs")
    assert found.made_by == f"PEFT {peft.__version__}"
    assert found.run == {}
    assert {module.norm for module in found.modules} == {0.0}

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    recipe = {
        "model": str(tiny_model),
        "data": {"train": str(rows), "eval": 0},
        "training": {"max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    lorakit.train(recipe, quiet=True)
    found = inspect(tmp_path / "run", base=str(tiny_model))
    assert found.made_by == f"lorakit {lorakit.__version__} (train)"
    assert found.run["steps"] == 1
    assert str(rows) in found.run["data"]
    assert found.fit is not None
    assert (found.fit.fits, found.fit.same_weights) == (True, True)

    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert inspect(tmp_path / "run", base=str(other)).fit.same_weights is False  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_any_kind_of_adapter_fits_its_base_and_not_another(
    how: dict[str, object], tiny_model: Path, tmp_path: Path
):
    adapter = make_adapter(tiny_model, tmp_path / "a", **how)
    found = inspect(adapter, base=str(tiny_model))
    assert found.fit is not None
    assert (found.fit.fits, found.fit.same_weights) == (True, None)
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    found = inspect(adapter, base=str(wide))
    assert found.fit is not None
    assert not found.fit.fits
    assert "has shape" in found.fit.reason
    encoder = save_tiny_encoder(tmp_path / "encoder")
    found = inspect(adapter, base=str(encoder))
    assert found.fit is not None
    assert "'q_proj' matches no module" in found.fit.reason


def test_what_is_no_number_is_named_and_does_not_stop_the_rest(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "a")
    weights = load_file(adapter / "adapter_model.safetensors")
    key = next(iter(weights))
    weights[key][0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    found = inspect(adapter)
    assert len(found.modules) == 13
    assert [part.reason for part in found.skipped] == ["holds NaN or Inf"]


def test_what_is_no_adapter_is_refused(tiny_model: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no adapter_config\.json"):
        inspect(tiny_model)
    with pytest.raises(InputError, match="is not a folder"):
        inspect(tmp_path / "nowhere")
    adapter = make_adapter(tiny_model, tmp_path / "a")
    with pytest.raises(InputError, match="no alias or folder"):
        inspect(adapter, base="nowhere")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="damaged or cut off"):
        inspect(adapter)
