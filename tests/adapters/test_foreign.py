"""Other tools' adapters become PEFT's with the same update, or are refused by name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lorakit
from gguf_models import save_family
from lorakit.adapters.foreign import import_adapter
from lorakit.errors import InputError
from plain_adapters import updates

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def factors(r: int, d_in: int, d_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(r, d_in, generator=generator),
        torch.randn(d_out, r, generator=generator),
    )


A0, B0 = factors(3, 32, 32)
A1, B1 = factors(5, 48, 32, seed=1)


def test_kohyas_names_are_found_among_the_bases_modules(tiny_model: Path, tmp_path: Path):
    save_file(
        {
            "lora_model_layers_0_self_attn_q_proj.lora_down.weight": A0,
            "lora_model_layers_0_self_attn_q_proj.lora_up.weight": B0,
            "lora_model_layers_0_self_attn_q_proj.alpha": torch.tensor(6.0),
            "lora_model_layers_1_mlp_down_proj.lora_down.weight": A1,
            "lora_model_layers_1_mlp_down_proj.lora_up.weight": B1,
        },
        tmp_path / "k.safetensors",
    )
    report = import_adapter(tmp_path / "k.safetensors", tmp_path / "out", base=str(tiny_model))
    assert (report.tool, report.modules, report.ranks) == ("kohya", 2, {3: 1, 5: 1})
    found = updates(tmp_path / "out")
    torch.testing.assert_close(found[Q0], 2.0 * B0 @ A0)
    torch.testing.assert_close(found[DOWN1], B1 @ A1)  # without an alpha it is r
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    layer = peft.PeftModel.from_pretrained(model, tmp_path / "out").get_submodule(
        f"base_model.model.{Q0}"
    )
    torch.testing.assert_close(layer.get_delta_weight("default"), 2.0 * B0 @ A0)


def test_loralibs_factors_stand_beside_weights_and_need_alpha(tiny_model: Path, tmp_path: Path):
    save_file(
        {f"{Q0}.lora_A": A0, f"{Q0}.lora_B": B0, f"{Q0}.weight": torch.zeros(32, 32)},
        tmp_path / "l.safetensors",
    )
    where: dict[str, Any] = {"base": str(tiny_model)}
    with pytest.raises(InputError, match="give --alpha"):
        import_adapter(tmp_path / "l.safetensors", tmp_path / "out", **where)
    with pytest.raises(InputError, match="--alpha must be"):
        import_adapter(tmp_path / "l.safetensors", tmp_path / "out", **where, alpha=0)
    report = import_adapter(tmp_path / "l.safetensors", tmp_path / "out", **where, alpha=9)
    assert "left out 1 tensors" in report.notices[0]
    torch.testing.assert_close(updates(tmp_path / "out")[Q0], 3.0 * B0 @ A0)


def test_loralibs_gpt2_and_embeddings_are_laid_out_as_peft_has_them(tmp_path: Path):
    base = save_family(tmp_path / "base", "gpt2")
    A, B = factors(2, 64, 192)
    E_A, E_B = factors(2, 320, 64, seed=3)
    save_file(
        {
            "transformer.h.0.attn.c_attn.lora_A": A,
            "transformer.h.0.attn.c_attn.lora_B": B,
            "transformer.wte.lora_A": E_A,
            "transformer.wte.lora_B": E_B,
        },
        tmp_path / "l.safetensors",
    )
    import_adapter(tmp_path / "l.safetensors", tmp_path / "out", base=str(base), alpha=2)
    found = updates(tmp_path / "out")
    torch.testing.assert_close(found["transformer.h.0.attn.c_attn"], (B @ A).T)
    torch.testing.assert_close(found["transformer.wte"], (E_B @ E_A).T)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"lora_unet_down.lora_down.weight": A0}, "an image model"),
        ({"lora_te1_text.lora_down.weight": A0}, "an image model"),
        ({"lora_model_layers_9_mlp.lora_down.weight": A0}, "names no module"),
        ({"lora_model_layers_0_self_attn_q_proj.dora_scale": A0}, "not part of a plain LoRA"),
        ({"lora_model_layers_0_self_attn_q_proj.lora_down.weight": A0}, "has no partner"),
        ({f"{Q0}.lora_A": A0, f"{Q0}.lora_B": torch.ones(33, 3)}, "for another base model"),
        ({f"{Q0}.lora_A": A0, f"{Q0}.lora_B": torch.ones(32, 6)}, "MergedLinear"),
        ({f"{Q0}.lora_A": A0[None], f"{Q0}.lora_B": B0[None]}, "only matrices"),
        ({f"{Q0}.lora_A": A0 * torch.nan, f"{Q0}.lora_B": B0}, "NaN or Inf"),
        ({"model.norm.lora_A": A0, "model.norm.lora_B": B0}, "not a layer of"),
        ({f"{Q0}.lora_a": A0.T.contiguous(), f"{Q0}.lora_b": A0}, "lora_parameters.scale"),
        ({"weight": A0}, "no adapter that lorakit knows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tensors: dict[str, torch.Tensor], why: str, tiny_model: Path, tmp_path: Path
):
    save_file(tensors, tmp_path / "x.safetensors")
    alpha = 2.0 if any(".lora_A" in key for key in tensors) else None
    with pytest.raises(InputError, match=why):
        import_adapter(
            tmp_path / "x.safetensors", tmp_path / "out", base=str(tiny_model), alpha=alpha
        )
    assert not (tmp_path / "out").exists()


def test_a_name_that_could_mean_two_modules_is_refused(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    names = {name.replace(".", "_") for name, _ in model.named_modules()}
    assert len(names) == sum(1 for _ in model.named_modules())  # no such name in real models
    from torch import nn

    from lorakit.adapters.foreign import _from_kohya

    twice = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    with pytest.raises(InputError, match=r"could mean a_b, a\.b"):
        _from_kohya(Path("x"), {"lora_a_b.lora_down.weight": A0}, twice)


def test_pickles_other_kinds_and_missing_settings_are_said(tiny_model: Path, tmp_path: Path):
    for name in ("a.bin", "a.pt", "a.npz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match="is damaged"):
            import_adapter(tmp_path / name, tmp_path / "out", base=str(tiny_model))
    (tmp_path / "a.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match="damaged or cut off"):
        import_adapter(tmp_path / "a.safetensors", tmp_path / "out", base=str(tiny_model))
    with pytest.raises(InputError, match=r"holds no adapters\.safetensors"):
        import_adapter(tmp_path, tmp_path / "out", base=str(tiny_model))
    save_file({f"{Q0}.lora_a": A0}, tmp_path / "adapters.safetensors")
    with pytest.raises(InputError, match="give --base"):
        import_adapter(tmp_path, tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "dora"}))
    with pytest.raises(InputError, match="mlx-lm's dora"):
        import_adapter(tmp_path, tmp_path / "out", base=str(tiny_model))
    with pytest.raises(InputError, match="already exists"):
        import_adapter(tmp_path, tmp_path, base=str(tiny_model))


def test_an_imported_adapter_is_opened_like_any_other(tiny_model: Path, tmp_path: Path):
    save_file({f"{Q0}.lora_A": A0, f"{Q0}.lora_B": B0}, tmp_path / "l.safetensors")
    import_adapter(tmp_path / "l.safetensors", tmp_path / "out", base=str(tiny_model), alpha=1)
    model, _ = lorakit.load_model(tiny_model, "float32")
    assert lorakit.LoraModel.from_pretrained(model, tmp_path / "out").active_adapters == ["default"]
