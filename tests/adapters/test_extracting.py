"""Base + extracted adapter is the tuned model, as far as the rank allows, in PEFT too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorakit.adapters.extract import extract
from lorakit.adapters.open import open_adapter
from lorakit.adapters.spectrum import spectra
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_adapter
from random_adapters import logits
from tiny import byte_tokenizer


def tuned_like(base: Path, folder: Path, change: Callable[[Any], None], **options: Any) -> Path:
    """The base with `change` done to it, in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def add_rank(k: int) -> Callable[[Any], None]:
    """Adds a difference of rank `k` to every matrix of the model's layers."""

    def change(model: Any) -> None:
        for name, weight in model.named_parameters():
            if (weight.dim() == 2 and ".layers." in name) or (".h." in name and weight.dim() == 2):
                weight += torch.randn(len(weight), k) @ torch.randn(k, weight.shape[1]) * 0.02

    return change


def test_a_difference_of_rank_k_comes_back_whole(tiny_model: Path, tmp_path: Path):
    tuned = tuned_like(tiny_model, tmp_path / "tuned", add_rank(3), max_shard_size="20KB")
    report = extract(str(tiny_model), str(tuned), tmp_path / "a", rank=3)
    assert report.modules == 14
    assert report.error < 1e-5
    assert min(report.retained.values()) > 1 - 1e-6
    expected, found = logits(tuned, None), logits(tiny_model, tmp_path / "a")
    assert (expected - logits(tiny_model, None)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ids = torch.arange(40)[None] * 5 % 259
    with torch.no_grad():
        ours = open_adapter(tmp_path / "a", dtype="float32").model(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    extract(str(tiny_model), str(tuned), tmp_path / "b", energy=0.999999)
    found_ranks = {s.r for s in spectra(*read_adapter(tmp_path / "b"))[0]}
    assert found_ranks == {3}


def test_the_energy_asked_for_is_what_every_module_retains(tiny_model: Path, tmp_path: Path):
    def change(model: Any) -> None:
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += torch.randn_like(weight) * 0.01

    tuned = tuned_like(tiny_model, tmp_path / "tuned", change)
    report = extract(str(tiny_model), str(tuned), tmp_path / "a")
    assert all(0.95 <= share < 1 for share in report.retained.values())
    assert report.whole == ["model.embed_tokens", "lm_head"]
    assert "kept whole" in report.notices[0]
    full = extract(str(tiny_model), str(tuned), tmp_path / "b", energy=1.0)
    assert full.error < 1e-5
    torch.testing.assert_close(
        logits(tiny_model, tmp_path / "b"), logits(tuned, None), rtol=1e-4, atol=1e-5
    )


def test_norms_that_differ_are_kept_whole(tiny_model: Path, tmp_path: Path):
    def change(model: Any) -> None:
        add_rank(2)(model)
        model.model.norm.weight += 0.1
        model.model.layers[0].input_layernorm.weight += 0.1

    tuned = tuned_like(tiny_model, tmp_path / "tuned", change)
    report = extract(str(tiny_model), str(tuned), tmp_path / "a", rank=2)
    assert set(report.whole) == {"model.norm", "model.layers.0.input_layernorm"}
    expected = logits(tuned, None)
    torch.testing.assert_close(logits(tiny_model, tmp_path / "a"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "tied"])
def test_transposed_weights_and_tied_heads(family: str, tmp_path: Path):
    torch.manual_seed(0)
    size = len(byte_tokenizer())
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=size)
        model: Any = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=size,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")

    def change(model: Any) -> None:
        add_rank(2)(model)
        model.get_input_embeddings().weight += 0.05

    tuned = tuned_like(tmp_path / "base", tmp_path / "tuned", change)
    report = extract(str(tmp_path / "base"), str(tuned), tmp_path / "a", rank=2)
    assert report.modules == (8 if family == "gpt2" else 14)
    assert len(report.whole) == 2
    expected = logits(tuned, None)
    found = logits(tmp_path / "base", tmp_path / "a")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_an_adapter_cannot_hold_is_refused_with_advice(tiny_model: Path, tmp_path: Path):
    def refusal(tuned: Path, **size: Any) -> str:
        with pytest.raises(InputError) as error:
            extract(str(tiny_model), str(tuned), tmp_path / "out", **size)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    tuned = tuned_like(tiny_model, tmp_path / "tuned", add_rank(2))
    assert "there is nothing to extract" in refusal(tiny_model)
    assert "either --rank or --energy" in refusal(tuned, rank=1, energy=0.5)
    assert "at least 1" in refusal(tuned, rank=0)
    assert "the largest is 32" in refusal(tuned, rank=33)
    assert "share in (0, 1]" in refusal(tuned, energy=1.5)

    def more_tokens(model: Any) -> None:
        model.resize_token_embeddings(264)

    larger = tuned_like(tiny_model, tmp_path / "larger", more_tokens)
    assert "(they differ in model.embed_tokens, lm_head" in refusal(larger)

    def not_finite(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan

    assert "NaN or Inf" in refusal(tuned_like(tiny_model, tmp_path / "nan", not_finite))
    deeper = LlamaForCausalLM.from_pretrained(tiny_model).config
    deeper.num_hidden_layers = 1
    LlamaForCausalLM(deeper).save_pretrained(tmp_path / "shallow")
    assert "is not a fine-tune" in refusal(tmp_path / "shallow")
    weights = tuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "damaged or cut off" in refusal(tuned)
    weights.unlink()
    assert "has no model.safetensors" in refusal(tuned)


def test_files_with_and_without_the_bodys_prefix_go_together(tmp_path: Path):
    """The first GPT-2's files have `h.0.attn…` where fine-tunes of it have `transformer.h.0…`."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=len(byte_tokenizer()))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    tuned = tuned_like(tmp_path / "base", tmp_path / "tuned", add_rank(2))
    weights = tmp_path / "base" / "model.safetensors"
    short = {key.removeprefix("transformer."): t for key, t in load_file(weights).items()}
    save_file(short, weights, metadata={"format": "pt"})
    report = extract(str(tmp_path / "base"), str(tuned), tmp_path / "a", rank=2)
    assert report.error < 1e-5
    found = logits(tmp_path / "base", tmp_path / "a")
    torch.testing.assert_close(found, logits(tuned, None), rtol=1e-4, atol=1e-5)
