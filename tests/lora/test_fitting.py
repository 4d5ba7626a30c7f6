"""Adapters under other names for the same modules are read; what does not fit says what it is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
)

import lorakit
from lorakit.errors import InputError
from lorakit.lora import LoraModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def vision_model() -> Any:
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


def adapted(model: Any, folder: Path, **config: Any) -> torch.Tensor:
    """Saves an adapter whose update is not zero; its logits."""
    torch.manual_seed(1)
    fields = {"r": 4, "init_lora_weights": False, **config}
    wrapped = lorakit.get_peft_model(model, lorakit.LoraConfig(**fields))
    wrapped.save_pretrained(folder)
    found = logits(wrapped)
    wrapped.unload()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(20)[None] * 3 % 200)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def rename(folder: Path, change: Callable[[str], str], **fields: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | fields))


OLD_NAMES: dict[str, tuple[Callable[[str], str], dict[str, Any]]] = {
    "Qwen2-VL until transformers 4.51": (
        lambda key: key.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ),
        {},
    ),
    "language_model before model": (
        lambda key: key.replace("model.model.language_model.", "model.language_model.model."),
        {"target_modules": r"language_model\.model\.layers\.\d+\.self_attn\.[qv]_proj"},
    ),
    "the language model alone": (
        lambda key: key.replace("model.model.language_model.", "model.model."),
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]},
    ),
    "its body alone": (
        lambda key: key.replace("model.model.language_model.", "model."),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:.*other names in this model")
@pytest.mark.parametrize(("change", "fields"), OLD_NAMES.values(), ids=OLD_NAMES)
def test_older_names_of_a_model_for_pictures_mean_the_same_modules(
    change: Callable[[str], str], fields: dict[str, Any], tmp_path: Path
):
    model = vision_model()
    targets = r".*language_model.*\.[qv]_proj"
    if "visual" in change("base_model.model.model.visual.x") and not fields:
        targets += r"|.*visual\.blocks\.\d\.attn\.qkv"
    ranks = {r".*layers\.1\.self_attn\.q_proj": 2}
    expected = adapted(model, tmp_path, target_modules=targets, rank_pattern=ranks)
    rename(tmp_path, change, **fields)
    wrapped = LoraModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(vision_model(), tmp_path / "again")
    assert torch.equal(logits(again), expected)


@pytest.mark.filterwarnings("ignore:.*other names in this model")
def test_an_adapter_of_the_body_fits_the_model_with_its_head_and_back(
    tiny_model: Path, tmp_path: Path
):
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    body = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    expected = adapted(whole, tmp_path / "whole", target_modules=["q_proj", "embed_tokens"])
    inside = logits(LoraModel.from_pretrained(body, tmp_path / "whole"))
    body = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(
        adapted(body, tmp_path / "body", target_modules=["q_proj", "embed_tokens"]), inside
    )
    assert torch.equal(logits(LoraModel.from_pretrained(whole, tmp_path / "body")), expected)


def test_names_that_could_mean_two_modules_are_not_guessed(tmp_path: Path):
    twins = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    adapted_twins = lorakit.get_peft_model(
        twins, lorakit.LoraConfig(r=1, target_modules=["q"], init_lora_weights=False)
    )
    adapted_twins.save_pretrained(tmp_path)
    two = nn.ModuleDict(
        {"b": nn.ModuleDict({"q": nn.Linear(2, 2)}), "c": nn.ModuleDict({"q": nn.Linear(2, 2)})}
    )
    with pytest.raises(InputError):
        LoraModel.from_pretrained(two, tmp_path)
    one = nn.ModuleDict({"b": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    with pytest.warns(UserWarning, match=re.escape("a.q is b.q")):
        LoraModel.from_pretrained(one, tmp_path)


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(InputError) as error:
        LoraModel.from_pretrained(model, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | fields))


def test_what_does_not_fit_names_its_kind_and_a_cure(tmp_path: Path):
    adapted(llama(), tmp_path, target_modules=["q_proj", "down_proj", "embed_tokens"])
    assert "another width" in refusal(llama(hidden_size=64, intermediate_size=96), tmp_path)
    assert "200 tokens where this one has 150" in refusal(llama(vocab_size=150), tmp_path)
    assert "--base, or --model" in refusal(llama(vocab_size=150), tmp_path)
    assert "at least 2 layers where this one has 1" in refusal(llama(num_hidden_layers=1), tmp_path)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4))
    assert "q_proj" in refusal(gpt2, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(
        {k: t.T.contiguous() if "_proj" in k else t for k, t in tensors.items()}, tmp_path / WEIGHTS
    )
    assert "transposed factors" in refusal(llama(), tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    rename(tmp_path, lambda key: key, r=8)
    assert "rank 4, not 8): correct r" in refusal(llama(), tmp_path)
    rename(tmp_path, lambda key: key, r=4)
    save_file({k: t for k, t in tensors.items() if "layers.1" not in k}, tmp_path / WEIGHTS)
    assert "incomplete" in refusal(llama(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_peft_left_out_comes_out_of_the_base_and_serves_beside_others(
    start: str, tiny_model: Path, tmp_path: Path
):
    import peft

    from lorakit.engine.open_engine import open_engine
    from random_adapters import change, make_adapter

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, init_lora_weights=start, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "a")
    expected = change(tiny_model, tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = LoraModel.from_pretrained(base, tmp_path / "a")
    for path in loaded.targeted_module_names:
        delta = loaded.get_base_model().get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(delta, expected[f"{path}.weight"], rtol=1e-3, atol=1e-4)
    make_adapter(tiny_model, tmp_path / "b", target_modules=["q_proj"])
    engine = open_engine(str(tiny_model), {"a": tmp_path / "a", "b": tmp_path / "b"})
    try:
        assert {info.name: info.rank for info in engine.pool.infos()} == {"a": 6, "b": 4}
    finally:
        engine.close()
