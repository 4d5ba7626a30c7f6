"""An adapter that brings tokens of its own goes to other programs merged, with its tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gguf_models import merging_tokenizer, save_family
from lorakit.adapters.export.gguf_files import export_gguf_adapter, export_gguf_model
from lorakit.adapters.export.mlx import export_mlx
from lorakit.adapters.export.ollama import export_ollama
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.extract import extract
from lorakit.errors import InputError
from lorakit.models.layouts.gguf_file import GGUFFile
from tiny import CHATML

END = "<|turn_end|>"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned model that ends its turns with a new token, and the adapter `a` beside it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_family(folder / "base", "llama")
    tokenizer = merging_tokenizer()
    tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", END)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        q = model.model.layers[0].self_attn.q_proj.weight
        q += torch.randn(64, 1) @ torch.randn(1, 64)
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    extract(str(base), str(folder / "tuned"), folder / "tuned" / "a", rank=1)
    return folder / "tuned"


def test_a_merged_gguf_file_has_the_tokens(tuned: Path, tmp_path: Path):
    export_gguf_model(tuned / "a", tmp_path / "model.gguf", dtype="float32")
    file = GGUFFile(tmp_path / "model.gguf")
    model = file.model("AutoModelForCausalLM", dtype="float32")
    tokenizer = file.tokenizer()
    ids = tokenizer(f"The{END}", return_tensors="pt").input_ids
    assert ids[0, -1] == 320
    expected = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_merged_model_for_ollama_stops_at_the_new_token(tuned: Path, tmp_path: Path):
    export_ollama(tuned / "a", tmp_path / "ollama", merged=True)
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert f'PARAMETER stop "{END}"' in text
    assert "<|im_end|>" not in text


def test_an_adapter_file_alone_is_refused_with_what_to_do(tuned: Path, tmp_path: Path):
    for export, name in ((export_gguf_adapter, "a.gguf"), (export_vllm, "a"), (export_mlx, "a")):
        with pytest.raises(InputError, match=r"modules trained whole.*lorakit merge"):
            export(tuned / "a", tmp_path / name)  # type: ignore[operator]
        assert not (tmp_path / name).exists()
