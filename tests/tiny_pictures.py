"""Tiny random models that read pictures, with a processor each, and pictures to read."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from picture_families import FAMILIES, PictureFamily
from tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "grey": (99, 99, 99)}

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def save_tiny(name: str, folder: Path, **changes: Any) -> Path:
    """Writes a random model of a family, always the same.

    The test is skipped where a module is not installed that the family needs.

    Args:
        name: of the family.
        changes: fields of its configuration.
    """
    family = FAMILIES[name]
    for module in family.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}")
    config = save_files(family, folder, **changes)
    torch.manual_seed(0)
    getattr(transformers, family.model)(config).save_pretrained(folder)
    return folder


def save_files(family: PictureFamily, folder: Path, **changes: Any) -> Any:
    """Writes what goes with a model's weights, as published ones have it; its configuration."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("<image>", family.shown)
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.tokens.values()]})
    tokenizer.save_pretrained(folder)
    _add(folder / "tokenizer_config.json", {"extra_special_tokens": dict(family.tokens)})
    named = {"processor_class": family.processor}
    pictures = {"image_processor_type": family.images, **family.sizes}
    _add(folder / "preprocessor_config.json", named | pictures)
    _add(folder / "processor_config.json", named | dict(family.settings))
    ends = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    numbers = tokenizer.get_vocab()
    fields = {
        k: numbers[v] if isinstance(v, str) and v in numbers else v
        for k, v in family.fields.items()
    }
    config = getattr(transformers, f"{family.stem}Config")(
        text_config={**_TEXT, **family.text, "vocab_size": len(tokenizer), **ends},
        vision_config=dict(family.vision),
        **fields,
        **changes,
    )
    config.save_pretrained(folder)
    return config


def _add(file: Path, values: dict[str, Any]) -> None:
    """Adds `values` to the JSON object in a file."""
    own = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(own | values))


def save_tiny_idefics3(folder: Path, **changes: Any) -> Path:
    """A random Idefics 3 (SmolVLM's architecture): pictures of 16 pixels, of 4 tokens each."""
    return save_tiny("Idefics 3, SmolVLM", folder, **changes)


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
