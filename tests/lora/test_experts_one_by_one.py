"""Adapters of experts one by one, as transformers 4 had them, are read as ones of their stacks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from base_models import BASE_MODELS, TOKENS
from lorakit import LoraConfig, LoraModel, get_peft_model
from lorakit.errors import InputError
from lorakit.lora.architecture import expert_parameters
from lorakit.lora.checkpoint import PREFIX, read_config, weights_file, write_adapter
from matrix import few

BY_NAME = {base.name: base for base in BASE_MODELS}
MIXTURES = [base.name for base in BASE_MODELS if expert_parameters(base.build())]
INPUTS_FIRST = {"Llama 4", "gpt-oss"}
"""Their stacks are (experts, in, out)."""

LAYERS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

pytestmark = pytest.mark.filterwarnings("ignore")


def write_experts(
    model: nn.Module, folder: Path, name: str, whole: bool = False, leave_out: str = ""
) -> dict[str, torch.Tensor]:
    """An adapter of attention and of each expert of the model; what it adds to the stacks.

    Args:
        whole: gates and up-projections are one layer, named as gpt-oss has it in 4 bits.
        leave_out: a layer that is not adapted.
    """
    targets = ["o_proj", "q_proj", *LAYERS, *LAYERS.values(), "gate_up_projs", "down_projs"]
    ours = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="attention"))
    ours.save_pretrained(folder)
    ours.unload()
    tensors = load_file(weights_file(folder))
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parent in {n.rpartition(".")[0] for n in expert_parameters(model)}:
        for number in range(4):
            sizes = {n: getattr(model.get_submodule(parent), n).shape[1:] for n in STACKS}
            for stack, (d_out, d_in) in sizes.items():
                if name in INPUTS_FIRST:
                    d_out, d_in = d_in, d_out
                rows = {stack: slice(None)}
                if stack == "gate_up_proj" and not whole:
                    rows = {"gate_proj": slice(0, d_out // 2), "up_proj": slice(d_out // 2, None)}
                for layer, own in rows.items():
                    if layer == leave_out or (number == 1 and layer == "up_proj"):
                        continue
                    W = torch.zeros(d_out, d_in)
                    A, B = torch.randn(4, d_in), torch.randn(len(W[own]), 4)
                    W[own] = 2.0 * B @ A
                    expected[f"{parent}.{stack}"][number] += W.T if name in INPUTS_FIRST else W
                    path = f"{layer}s.{number}" if whole else f"{number}.{layer}"
                    key = f"{PREFIX}{parent}.{path}"
                    if name == "Mixtral":
                        key = key.replace(".mlp.", ".block_sparse_moe.").replace(
                            layer, LAYERS[layer]
                        )
                    tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    config = read_config(folder)
    config.target_modules = targets
    write_adapter(folder, config, tensors)
    return expected


STACKS = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    ("name", "whole", "leave_out"),
    few(
        [(name, name == "gpt-oss", "") for name in MIXTURES] + [("Qwen 3 MoE", False, "gate_proj")],
        ("Mixtral", False, ""),
        ("Llama 4", False, ""),
        ("gpt-oss", True, ""),
        ("Qwen 3 MoE", False, "gate_proj"),
    ),
)
def test_their_update_is_that_of_every_expert(
    name: str, whole: bool, leave_out: str, tmp_path: Path
):
    torch.manual_seed(0)
    model = BY_NAME[name].build()
    expected = write_experts(model, tmp_path, name, whole, leave_out)
    ours = LoraModel.from_pretrained(model, tmp_path)
    ids = torch.randint(4, TOKENS, (2, 9))
    with torch.no_grad():
        logits = ours(ids).logits
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-3, atol=1e-4)
    for key, parameter in merged.named_parameters():
        if key.rpartition(".")[2] in STACKS:
            torch.testing.assert_close(parameter, expected[key], rtol=1e-4, atol=1e-5)


def test_experts_of_another_size_are_refused(tmp_path: Path):
    model = BY_NAME["Qwen 3 MoE"].build()
    write_experts(model, tmp_path, "Qwen 3 MoE")
    tensors = load_file(weights_file(tmp_path))
    key = next(key for key in tensors if ".experts.3.down_proj.lora_A" in key)
    tensors[key] = torch.randn(4, 7)
    save_file(tensors, weights_file(tmp_path))
    with pytest.raises(InputError, match="adapter for another base model"):
        LoraModel.from_pretrained(model, tmp_path)
