"""Tiny random models that read pictures, with a processor each, and pictures to read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "grey": (99, 99, 99)}


def save_tiny_idefics3(folder: Path, **changes: Any) -> Path:
    """A random Idefics 3 (SmolVLM's architecture): pictures of 16 pixels, of 4 tokens each."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        scale_factor=2,
        image_token_id=image_token,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHATML)
    processor.save_pretrained(folder)
    return folder


def save_pictures(folder: Path, several: int = 1) -> list[Path]:
    """A picture of each color, `several` times with other sizes."""
    folder.mkdir(exist_ok=True)
    files = []
    for n in range(several):
        for name, color in COLORS.items():
            file = folder / f"{name}-{n}.png"
            Image.new("RGB", (12 + 7 * n, 16), color).save(file)
            files.append(file)
    return files


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def save_tiny_qwen2_5_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL, whose files name its processor as published ones do."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("<image>", shown)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    config = Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, min_pixels=64, max_pixels=256, temporal_patch_size=2
    )
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}
    file.write_text(json.dumps(values))
    return folder


def save_tiny_llava(folder: Path) -> Path:
    """A random LLaVA: a CLIP tower and a Llama; pictures of 16 pixels, of 16 tokens each."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        text_config={
            **_TEXT,
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML,
    ).save_pretrained(folder)
    return folder


def save_tiny_qwen3_vl(folder: Path) -> Path:
    """A random Qwen3-VL, with features of its first vision layer in the first text layer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    save_tiny_qwen2_5_vl(folder)
    tokenizer = byte_tokenizer()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    config = Qwen3VLConfig(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"processor_class": "Qwen3VLProcessor"}
    file.write_text(json.dumps(values))
    return folder


def save_tiny_gemma3(folder: Path) -> Path:
    """A random Gemma 3, whose pictures' tokens see each other."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(0)
    template = CHATML.replace("<image>", "<start_of_image>")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks.values()]})
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"extra_special_tokens": marks}
    file.write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin, end, image = tokenizer.convert_tokens_to_ids([*marks.values()])
    config = Gemma3Config(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template).save_pretrained(
        folder
    )
    return folder


def save_tiny_internvl(folder: Path) -> Path:
    """A random InternVL with a Qwen 2."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    torch.manual_seed(0)
    template = CHATML.replace("<image>", "<IMG_CONTEXT>")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks.values()]})
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": marks}))
    config = InternVLConfig(
        text_config={
            **_TEXT,
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False)
    images.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"processor_class": "InternVLProcessor"}
    file.write_text(json.dumps(values))
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def save_tiny_smolvlm(folder: Path) -> Path:
    """`save_tiny_idefics3` as a SmolVLM, whose processor asks for num2words."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    pytest.importorskip("num2words")
    save_tiny_idefics3(folder)
    values = json.loads((folder / "config.json").read_text())
    given = {k: values[k] for k in ("text_config", "scale_factor", "image_token_id")}
    vision = values["vision_config"] | {"model_type": "smolvlm_vision"}
    torch.manual_seed(0)
    config = SmolVLMConfig(**given, vision_config=vision)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    images.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    named = {"processor_class": "SmolVLMProcessor"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    (folder / "processor_config.json").write_text(json.dumps(named | {"image_seq_len": 4}))
    return folder
