"""Random adapters on disk, and what they change, computed by PEFT."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.lora.checkpoint import PREFIX, read_adapter, write_adapter


def make_adapter(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Writes an adapter whose update is not zero, of rank 4 on all linear layers by default."""
    model, _ = lorakit.load_model(base, "float32")
    torch.manual_seed(seed)
    fields = {
        "r": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **config,
    }
    adapted = lorakit.get_peft_model(model, lorakit.LoraConfig(**fields))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02 if "lora_" in name else 0.1)
    adapted.save_pretrained(folder)
    return folder


def make_reward_model(base: Path, folder: Path, outputs: int = 1) -> Path:
    """Writes an adapter of a reward model: a random one with a random head of one output.

    With more outputs it is a classifier's.
    """
    make_adapter(base, folder)
    config, tensors = read_adapter(folder)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier", "score"]
    width = next(len(t.T) for name, t in tensors.items() if name.endswith("q_proj.lora_A.weight"))
    tensors[f"{PREFIX}score.weight"] = torch.randn(outputs, width)
    write_adapter(folder, config, tensors)
    return folder


def change(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT changes in every weight of the base when it merges the adapter, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    after = merged.state_dict()
    assert after.keys() == before.keys()
    return {name: after[name] - before[name] for name in before}


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """The logits of PEFT's base + adapter, in float32, for a few tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.arange(40)[None] * 5 % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids).logits
