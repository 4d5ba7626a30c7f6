"""A language part that is merged in the files of a model for pictures stays a part of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from base_models import DELTA_NET, LLAMA, SLIDING, VISION, BaseModel, words
from lorakit.adapters.merge import merge
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from random_adapters import make_adapter
from tiny import byte_tokenizer

SIZED = {**LLAMA, "vocab_size": 259}
GEMMA_4 = BaseModel(
    "Gemma 4",
    "Gemma4ForConditionalGeneration",
    "Gemma4Config",
    {
        "text_config": {
            **SIZED,
            "head_dim": 4,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            **SLIDING,
        },
        "vision_config": {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
            "use_clipped_linears": True,
        },
        "audio_config": None,
        "image_token_id": 200,
        "video_token_id": 201,
        "audio_token_id": 202,
    },
    words,
)
QWEN_3_5 = BaseModel(
    "Qwen 3.5",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5Config",
    {
        "text_config": {**SIZED, **DELTA_NET},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
        },
        "image_token_id": 200,
        "video_token_id": 201,
    },
    words,
)


def saved(base: BaseModel, folder: Path) -> Path:
    base.build().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**words()).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [QWEN_3_5, GEMMA_4], ids=lambda base: base.name)
def test_the_merged_folder_is_the_whole_model_with_the_part_merged(base: BaseModel, tmp_path: Path):
    """Gemma 4's clipped layers have limits, which are infinite where nothing is clipped."""
    folder = saved(base, tmp_path / "base")
    adapter = make_adapter(folder, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert type(config) is type(AutoConfig.from_pretrained(folder))
    assert config.architectures == [base.kind]
    assert (config.dtype, config.get_text_config().vocab_size) == (torch.float32, 259)
    merged, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    before = logits(whole)
    expected = logits(LoraModel.from_pretrained(whole, adapter))
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_name_that_means_layers_in_a_wrapping_too_is_refused_with_a_cure(tmp_path: Path):
    folder = saved(GEMMA_4, tmp_path / "base")
    with pytest.raises(
        InputError, match=r"Gemma4ClippableLinear: .* exclude_modules leaves it out"
    ):
        make_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    make_adapter(
        folder, tmp_path / "adapter", target_modules=["q_proj"], exclude_modules=r".*vision_tower.*"
    )
