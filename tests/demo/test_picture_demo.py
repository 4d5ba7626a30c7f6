"""The demo with pictures: its base model is one of transformers', and it learns to see."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from lorakit.demo.picture_base import IMAGE_TOKENS, write_base
from lorakit.demo.run_pictures import run_picture_demo, wilson_interval
from lorakit.demo.shapes import CHANCE, pictures
from lorakit.demo.vision_tower import drawn, pretrained_tower


def test_the_base_is_the_language_model_behind_the_tower_and_transformers_loads_it(
    tiny_model: Path, tmp_path: Path
):
    write_base(tmp_path / "base", 5, str(tiny_model), tower_steps=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert model.dtype == torch.bfloat16
    tower = pretrained_tower(*drawn(5, 2), 5, 2).state_dict()
    for name, tensor in model.model.vision_model.state_dict().items():
        assert torch.equal(tensor, tower[name].bfloat16())
    language = AutoModelForCausalLM.from_pretrained(tiny_model)
    old = len(AutoTokenizer.from_pretrained(tiny_model))
    assert torch.equal(model.lm_head.weight[:old], language.lm_head.weight.bfloat16())
    for name, tensor in model.model.text_model.state_dict().items():
        assert torch.equal(tensor[:old], language.model.get_parameter(name).bfloat16())

    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    [(image, _)] = pictures(1, 3)
    asked = [{"type": "image"}, {"type": "text", "text": "Which digit?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}])
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == IMAGE_TOKENS
    inputs["pixel_values"] = inputs.pixel_values.bfloat16()
    with torch.no_grad():
        seen = model(**inputs).logits
        inputs["pixel_values"] = -inputs["pixel_values"]
        other = model(**inputs).logits
    assert seen.isfinite().all()
    assert not torch.equal(seen[0, -1], other[0, -1])


def test_the_interval_of_a_share_is_wilsons():
    low, high = wilson_interval(0.9, 100)
    assert abs(low - 0.8256) < 1e-3
    assert abs(high - 0.9448) < 1e-3
    assert wilson_interval(1.0, 100)[1] == 1.0
    assert 0.96 < wilson_interval(1.0, 100)[0] < 0.97


@pytest.mark.exhaustive
def test_the_demo_of_a_tiny_model_writes_what_it_measured(tiny_model: Path, tmp_path: Path):
    said: list[str] = []
    done = run_picture_demo(
        tmp_path / "demo",
        said.append,
        train_pictures=40,
        held_out_pictures=6,
        make_base=partial(write_base, language=str(tiny_model), tower_steps=2),
    )
    written = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert written == {
        "base_exact_match": done.base_exact_match,
        "tuned_exact_match": done.tuned_exact_match,
        "interval": [*done.interval],
        "chance": CHANCE,
        "seconds": done.seconds,
        "rows": 6,
    }
    keys = [*load_file(tmp_path / "demo" / "adapter" / "adapter_model.safetensors")]
    assert any(".connector." in key for key in keys)
    assert not any(".vision_model." in key for key in keys)
    text = "\n".join(said)
    assert text.count("  before  ") == text.count("  after   ") == 3
    for verb in ("chat", "eval", "train"):
        assert f" {verb} " in text[text.index("Try next") :]


@pytest.mark.exhaustive
def test_the_demo_teaches_pictures_from_chance_to_nine_of_ten(tmp_path: Path):
    done = run_picture_demo(tmp_path / "demo", lambda line: None)
    assert done.base_exact_match <= CHANCE
    assert done.interval[0] > 2 * CHANCE
    assert done.tuned_exact_match >= 0.9
