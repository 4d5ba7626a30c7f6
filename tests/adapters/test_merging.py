"""A merged folder is base + adapter, proved after reading it back; otherwise there is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.adapters.open import open_adapter
from lorakit.errors import InputError, LorakitError
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model, _ = lorakit.load_model(base, "float32")
    torch.manual_seed(5)
    config = lorakit.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_folder_loads_without_lorakit_and_is_base_plus_adapter(adapter: Path, tmp_path: Path):
    report = lorakit.merge(adapter, tmp_path / "merged")
    assert report.passed
    assert report.dtype == "float32"
    assert report.modules == 14
    assert report.top1_agreement == 1
    assert report.largest_difference < 1e-4 < report.adapter_effect
    assert report.lost_share < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("a text", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = open_adapter(adapter, dtype="float32").model(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert "assistant" in tokenizer.chat_template
    assert not list(tmp_path.glob(".merged*"))


def test_the_written_dtype_is_that_of_the_bases_files_or_the_one_asked_for(
    adapter: Path, base: Path, tmp_path: Path
):
    half = tmp_path / "half"
    model, tokenizer = lorakit.load_model(base, "bfloat16")
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    assert lorakit.merge(adapter, tmp_path / "a", base=str(half)).dtype == "bfloat16"
    assert (
        lorakit.merge(adapter, tmp_path / "b", base=str(half), dtype="float32").dtype == "float32"
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="--dtype must be one of"):
        lorakit.merge(adapter, tmp_path / "c", dtype="int8")


def test_a_merge_that_the_dtype_cannot_hold_fails_and_leaves_nothing(
    adapter: Path, base: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if "down_proj.lora_B" in k)
    tensors[key] = tensors[key] * 1e7  # beyond float16's largest number
    save_file(tensors, weights)
    with pytest.raises(LorakitError, match="not base \\+ adapter") as error:
        lorakit.merge(adapter, tmp_path / "merged", dtype="float16")
    assert error.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_too_small_for_the_dtype_is_not_called_merged(adapter: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for key in tensors:
        if "lora_B" in key:
            tensors[key] *= 1e-4  # below half a step of bfloat16 for almost every weight
    save_file(tensors, weights)
    with pytest.raises(LorakitError, match=r"of what the adapter does is lost in bfloat16"):
        lorakit.merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    assert lorakit.merge(adapter, tmp_path / "merged", dtype="float32").passed


def test_an_adapter_that_does_nothing_yet_merges_into_the_base(base: Path, tmp_path: Path):
    model, _ = lorakit.load_model(base, "float32")
    lorakit.get_peft_model(model, lorakit.LoraConfig()).save_pretrained(tmp_path / "new")
    assert lorakit.merge(tmp_path / "new", tmp_path / "merged").largest_difference == 0


def test_the_chat_template_beside_an_adapter_is_the_one_that_is_used(adapter: Path):
    assert "assistant" in str(open_adapter(adapter).tokenizer.chat_template)
    (adapter / "chat_template.jinja").write_text("mine")
    assert open_adapter(adapter).tokenizer.chat_template == "mine"


def test_an_adapter_on_other_weights_than_it_was_trained_on_is_warned_of(
    base: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    lorakit.train(
        {
            "model": str(base),
            "data": {"train": str(rows), "eval": 0},
            "training": {"max_steps": 1},
            "output_dir": str(tmp_path / "run"),
        },
        quiet=True,
    )
    other = tmp_path / "other"
    model, tokenizer = lorakit.load_model(base, "float32")
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.warns(UserWarning, match="trained on other weights"):
        open_adapter(tmp_path / "run", base=str(other))


def test_a_damaged_record_is_said(adapter: Path):
    (adapter / "lorakit.json").write_text("{}")
    with pytest.raises(InputError, match=r"lorakit\.json is damaged"):
        open_adapter(adapter)


def test_a_base_that_is_gone_is_said(adapter: Path, tmp_path: Path):
    config = adapter / "adapter_config.json"
    values = json.loads(config.read_text())
    gone = shutil.copytree(adapter, tmp_path / "gone")
    (gone / "adapter_config.json").write_text(
        json.dumps(values | {"base_model_name_or_path": str(tmp_path / "nowhere")})
    )
    with pytest.raises(InputError, match="nowhere"):
        open_adapter(gone)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_unpacked_and_written_plain(kind: str, tmp_path: Path):
    from transformers import BitsAndBytesConfig

    settings = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    plain = save_tiny_model(tmp_path / "plain", hidden_size=64)
    packed = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings[kind], dtype=torch.bfloat16
    ).save_pretrained(packed)
    AutoTokenizer.from_pretrained(plain).save_pretrained(packed)
    model, _ = lorakit.load_model(packed)
    config = lorakit.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = lorakit.merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.passed
    assert report.dtype == "bfloat16"
    assert "the base is quantised (bitsandbytes); it is written unquantised" in report.notices[0]
    assert "quantization" not in (tmp_path / "merged" / "config.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_an_adapter_that_replicates_layers_is_merged_into_the_deeper_model(
    base: Path, tmp_path: Path
):
    model, _ = lorakit.load_model(base, "float32")
    config = lorakit.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, layer_replication=[[0, 2], [1, 2]]
    )
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = lorakit.merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.passed
    assert "layer_replication" in report.notices[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.num_hidden_layers == len(merged.model.layers) == 3


@pytest.mark.exhaustive
def test_a_gguf_base_is_unpacked_and_merged(tmp_path: Path):
    from lorakit.models.bundled import _gguf_file

    model, _ = lorakit.load_model(str(_gguf_file()), "float32")
    config = lorakit.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = lorakit.merge(
        tmp_path / "adapter", tmp_path / "merged", base=str(_gguf_file()), dtype="bfloat16"
    )
    assert report.passed
    assert "quantised (GGUF)" in report.notices[0]
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_merge_without_verifying_tells_of_other_weights_too(base: Path, tmp_path: Path):
    from lorakit.models.fingerprint import fingerprint

    model, _ = lorakit.load_model(base, "bfloat16")
    own = fingerprint(model)
    config = lorakit.LoraConfig(target_modules=["q_proj"])
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    record = {
        **dict.fromkeys(("steps", "train_tokens", "supervised_tokens", "seed"), 1),
        **dict.fromkeys(("train_seconds", "tokens_per_second", "peak_memory_mb"), 1.0),
        "base_model": str(base), "recipe": {}, "data": [], "versions": {}, "eval_loss": None,
        "base_eval_loss": None, "base_fingerprint": own,
    }  # fmt: skip
    (tmp_path / "adapter" / "lorakit.json").write_text(json.dumps(record))
    assert lorakit.merge(tmp_path / "adapter", tmp_path / "same", verify=False).notices == ()
    (tmp_path / "adapter" / "lorakit.json").write_text(
        json.dumps({**record, "base_fingerprint": "x"})
    )
    report = lorakit.merge(tmp_path / "adapter", tmp_path / "other", verify=False)
    assert "was trained on other weights" in report.notices[0]
