"""Tokens that a recipe names: added, trained by their rows alone, and carried by every verb."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from command import run_lorakit
from lorakit.adapters.lineage import digest
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.models.load import load_model
from lorakit.models.new_tokens import add_tokens
from matrix import few
from small_runs import recipe, weights
from tiny import byte_tokenizer

SIZE = len(byte_tokenizer())
NEW = ["<|call|>", "<|done|>"]


@pytest.fixture(params=few(["untied", "tied"], "tied"))
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if request.param == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def calls(folder: Path) -> Path:
    rows = folder / "calls.jsonl"
    lines = [{"prompt": f"call {n}", "completion": f"<|call|>{n}<|done|>"} for n in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def values(base: Path, folder: Path, **training: Any) -> dict[str, Any]:
    made = recipe(base, calls(folder), folder / "run", **{"learning_rate": 3e-2} | training)
    return made | {"tokens": NEW, "dtype": "float64"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[5, SIZE, 7, SIZE + 1]])).logits
    return found


def test_new_tokens_are_trained_merged_served_and_read_by_peft(base: Path, tmp_path: Path):
    found = lorakit.train(values(base, tmp_path), quiet=True)
    assert found.eval_loss is not None
    run = tmp_path / "run"
    assert any("<|call|>" in notice for notice in found.manifest.notices)
    opened = open_adapter(run, dtype="float64")
    assert opened.added_tokens == 2
    assert opened.tokenizer("<|call|>1", add_special_tokens=False).input_ids[0] == SIZE
    assert opened.tokenizer.decode([SIZE], skip_special_tokens=True) == "<|call|>"

    # Rows of other tokens are the base's, those of the new ones have moved.
    plain, _ = load_model(str(base), "float64")
    merged, tokenizer = None, AutoTokenizer.from_pretrained(run)
    lorakit.merge(run, tmp_path / "merged", dtype="float64")
    merged, _ = load_model(str(tmp_path / "merged"), "float64")
    started, _ = load_model(str(base), "float64")
    add_tokens(started, byte_tokenizer(), NEW)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(model, get)().weight for model in (plain, merged))
        assert len(now) == SIZE + 2
        assert torch.equal(now[:SIZE], was)
        assert (now[SIZE:] - getattr(started, get)().weight[SIZE:]).abs().max(1).values.min() > 0
    assert (logits(merged) - logits(opened.model)).abs().max() < 1e-9
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<|done|>").input_ids == [SIZE + 1]
    assert len(tokenizer) == SIZE + 2

    resized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    resized.resize_token_embeddings(SIZE + 2)
    theirs = peft.PeftModel.from_pretrained(resized, run, autocast_adapter_dtype=False)
    assert (logits(theirs) - logits(opened.model)).abs().max() < 1e-9

    with closing(open_engine(None, {"run": run}, dtype="float32", merged=True)) as engine:
        prompt = engine.tokenizer("call 3<|call|>").input_ids
        assert SIZE in prompt
        assert list(engine.submit(prompt, sampling=Sampling(max_new_tokens=4)))


def test_it_is_resumed_to_the_same_bytes_and_goes_on_in_another_stage(base: Path, tmp_path: Path):
    own = values(base, tmp_path, max_steps=4, save_steps=2)
    lorakit.train(own, quiet=True)
    run = tmp_path / "run"
    before = digest(run)
    for folder in (run, run / "checkpoint-4"):  # the new rows, and nothing of the embedding
        whole = [k for k in weights(folder) if k.endswith("base_layer.weight")]
        assert not whole
    opened, finished = (open_adapter(f, dtype="float64") for f in (run / "checkpoint-4", run))
    assert opened.added_tokens == 2
    assert torch.equal(logits(opened.model), logits(finished.model))
    (run / "lorakit.json").unlink()
    (run / "adapter_model.safetensors").unlink()
    for file in (run / "checkpoint-4").iterdir():
        if file.is_file():
            file.unlink()
    lorakit.train(own, resume=True, quiet=True)
    assert digest(run) == before
    on = {"adapter": str(run), "output_dir": str(tmp_path / "on"), "samples": 0}
    data = {"data": {"train": str(tmp_path / "calls.jsonl")}, "training": {"max_steps": 1}}
    found = lorakit.train(on | data, quiet=True).manifest
    assert found.parent is not None
    assert open_adapter(tmp_path / "on").tokenizer("<|call|>").input_ids == [SIZE]


def test_tokens_that_the_tokenizer_has_are_trained_and_not_added(tiny_model: Path, tmp_path: Path):
    own = values(tiny_model, tmp_path, max_steps=1) | {"tokens": ["<|im_end|>"]}
    lorakit.train(own, quiet=True)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    [number] = byte_tokenizer()("<|im_end|>").input_ids
    assert set(map(tuple, config["trainable_token_indices"].values())) == {(number,)}
    assert not (tmp_path / "run" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": [" x"]}, "space"),
        ({"tokens": ["<a>", "<a>"]}, "twice"),
        ({"tokens": "<a>"}, "tokens"),
        ({"lora": {"trainable_token_indices": [1]}}, "trainable_token_indices"),
        ({"chat_template": "nowhere.jinja"}, "nowhere.jinja"),
    ],
)
def test_what_cannot_be_added_is_named(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], named: str
):
    with pytest.raises(InputError, match=named):
        lorakit.train(values(tiny_model, tmp_path) | changes, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_recipes_own_chat_template_goes_with_the_adapter(tiny_model: Path, tmp_path: Path):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    own = values(tiny_model, tmp_path, max_steps=1)
    own |= {"tokens": [], "chat_template": str(tmp_path / "own.jinja")}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(own))
    done = run_lorakit(tmp_path, "train", path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == template
    assert open_adapter(tmp_path / "run").tokenizer.chat_template == template
