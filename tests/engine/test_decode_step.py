"""The function that computes one token of each row, beside the model's own forward."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import layer_kinds
from lorakit.engine.cache import row_cache
from lorakit.engine.carried import how_carried
from lorakit.engine.resident import ResidentModel
from lorakit.lora import LoraConfig
from lorakit.lora.routing import BASE, Route
from matrix import few

SIZES = layer_kinds.SIZES | {"num_hidden_layers": 2}
SERVED: dict[str, PreTrainedConfig] = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=16),
    "llama, gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "granite, whose residuals are scaled": GraniteConfig(**SIZES, residual_multiplier=0.9),
    "smollm3, some layers without positions": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "mistral, a window": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
}


def made(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("config", few(SERVED, "llama, biases", "qwen3"))
def test_rows_of_any_adapters_get_the_logits_of_the_models_own_forward(config: PreTrainedConfig):
    base = made(config, torch.float64)
    for parameter in base.parameters():  # biases and norms are zeros and ones at first
        parameter.data += 0.05 * torch.randn_like(parameter)
    resident = ResidentModel(base, stays_wrapped=True)
    resident.pack()
    for seed, (name, rank) in enumerate({"a": 3, "b": 2}.items()):
        own = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
        resident.create(name, own, seed)
        for tensor in resident.trained(name).values():
            tensor.data.normal_(std=0.3)
    resident.pack(["a", "b"])
    step, packed = resident.carried.step, resident.model.packed
    assert step is not None
    with torch.inference_mode():
        for names in (["a", "b", BASE], ["b"] * 3, [BASE] * 3):
            route = Route.of_rows(names, (3, 1))
            resident.model.routing.route = route
            logits = []
            for own_step in (True, False):
                cache = row_cache(base, rows=3, length=16)
                prompts = [[5, 6, 7, 8], [9], [3, 4]]
                base(**cache.whole_prompts(0, prompts, base.device))
                for lengths in ([4, 1, 2], [5, 2, 3]):
                    given = cache.newest_tokens([11, 12, 13], lengths, base.device)
                    if own_step:
                        assert step.serves(route, packed)
                        found = step(cache, given, route, packed)
                    else:
                        found = base(**given).logits[:, -1]
                logits.append(found)
            by_step, by_model = logits
            # Norms are computed in float32.
            assert torch.allclose(by_step, by_model, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", few(OTHERS, *OTHERS))
def test_a_model_of_another_shape_is_computed_by_its_modules(config: PreTrainedConfig):
    found = how_carried(made(config))
    assert not found.why_not
    assert found.step is None


def test_an_adapter_with_more_than_packed_factors_is_computed_by_the_modules():
    resident = ResidentModel(made(SERVED["qwen2"]), stays_wrapped=True)
    resident.pack()
    resident.create("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    resident.create("tokens", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    resident.create("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    resident.pack(["dora", "tokens", "plain"])
    step, packed = resident.carried.step, resident.model.packed
    assert step is not None
    with torch.inference_mode():
        served = {
            name: step.serves(Route.of_rows([name, BASE]), packed)
            for name in ("dora", "tokens", "plain", BASE)
        }
        resident.model.delete_adapter("plain")
        served["deleted"] = step.serves(Route.of_rows(["plain", BASE]), packed)
    assert [name for name, serves in served.items() if serves] == ["plain", BASE]
