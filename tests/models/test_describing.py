"""What is said of a base model without its weights is what the loaded model is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, ViTConfig, ViTModel

import lorakit
from chatglm_folders import write_original
from command import run_lorakit
from gguf_models import save_family
from lorakit.adapters.export.gguf_files import write_gguf
from lorakit.errors import InputError
from lorakit.models import bundled
from lorakit.models.describe import RANK, describe, known_models
from tiny import CHATML, save_tiny_encoder, save_tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, folder: Path) -> Path:
    """A hub model in the cache, as the hub's client lays it out."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    return Path(shutil.copytree(folder, place / "snapshots" / "c0ffee"))


@pytest.mark.parametrize("kind", ["llama", "original chatglm", "gpt2"])
def test_the_facts_are_those_of_the_loaded_model(kind: str, tmp_path: Path):
    folder = tmp_path / "model"
    if kind == "llama":
        save_tiny_model(folder)
    elif kind == "gpt2":
        save_family(folder, "gpt2")
    else:
        write_original(folder, dtype=torch.bfloat16)
    facts = describe(str(folder))
    model, tokenizer = lorakit.load_model(str(folder), "float32")
    assert (facts.family, facts.architecture) == (model.config.model_type, type(model).__name__)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.dtype == ("bfloat16" if kind == "original chatglm" else "float32")
    assert facts.vocabulary == model.config.vocab_size
    assert facts.context == model.config.max_position_embeddings
    assert facts.template == tokenizer.chat_template
    assert "CAUSAL_LM" in facts.tasks
    assert facts.bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    for preset, means in facts.presets.items():
        adapted = lorakit.get_peft_model(
            model, lorakit.LoraConfig(r=RANK, target_modules=preset, lora_dropout=0.1)
        )
        assert means.modules == len(adapted.targeted_module_names)
        assert means.parameters == adapted.get_nb_trainable_parameters()[0]
        assert means.target_modules == adapted.peft_config["default"].target_modules
        model = adapted.unload()
    assert list(facts.presets) == ["attention-minimal", "attention", "all-linear"]


def test_a_gguf_file_is_described_from_its_header(tmp_path: Path):
    folder = save_family(tmp_path / "llama", "llama", "smollm")
    write_gguf(folder, tmp_path / "llama.gguf", "q8_0", "llama")
    facts, plain = describe(str(tmp_path / "llama.gguf")), describe(str(folder))
    assert (facts.family, facts.dtype) == ("llama", "Q8_0")
    assert facts.parameters == plain.parameters
    assert facts.bytes == (tmp_path / "llama.gguf").stat().st_size
    assert facts.template == plain.template


@pytest.mark.exhaustive
def test_the_bundled_gguf_file_is_described():
    gguf = bundled._gguf_file()
    facts = describe(str(gguf))
    assert (facts.family, facts.dtype, facts.parameters) == ("llama", "Q4_1", 134_515_008)
    assert facts.bytes == gguf.stat().st_size
    assert facts.template is not None
    assert "<|im_start|>" in facts.template


def test_models_without_a_causal_form_are_described_too(tmp_path: Path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = ViTModel(ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "vit")
    facts = describe(str(tmp_path / "vit"))
    assert (facts.architecture, facts.tasks, facts.template) == ("ViTModel", [], None)
    assert (facts.vocabulary, facts.context) == (None, None)
    assert facts.presets["attention"].modules == 8


def test_what_files_lack_and_what_is_quantised_is_said(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert describe(str(folder)).quantization == "bitsandbytes nf4"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    facts = describe(str(folder))
    assert facts.dtype is None
    assert facts.notices == ["pickles only, which are not loaded"]
    (folder / "pytorch_model.bin").unlink()
    assert describe(str(folder)).notices == ["no weights here"]
    (folder / "chat_template.jinja").unlink()
    assert describe(str(folder)).template is None
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert describe(str(folder)).template == CHATML


def test_what_cannot_be_described_is_one_line(tmp_path: Path, cache: Path):
    def refusal(name: object) -> str:
        with pytest.raises(InputError) as error:
            describe(str(name))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not in the local cache" in refusal("nobody/nothing")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    assert str(folder) in refusal(folder)
    LlavaConfig().save_pretrained(folder)
    (folder / "chat_template.json").write_text("[")
    assert "chat_template.json is damaged" in refusal(folder)


def test_the_cache_of_the_hub_is_listed_and_its_ids_described(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    assert [one.name for one in known_models()] == [bundled.ALIAS, bundled.ENCODER]
    tiny = save_tiny_model(tmp_path / "tiny")
    put(cache, "ada/small", tiny)
    bert = put(cache, "Bob/bert", save_tiny_encoder(tmp_path / "bert"))
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    put(cache, "cy/chatglm", write_original(tmp_path / "glm", form="bin"))
    model, _ = lorakit.load_model(str(tiny))
    adapted = lorakit.get_peft_model(model, lorakit.LoraConfig())
    adapted.save_pretrained(tmp_path / "adapter")
    put(cache, "di/adapter", tmp_path / "adapter")
    listed = {one.name: one for one in known_models()}
    cached = ["ada/small", "Bob/bert", "cy/chatglm", "di/adapter"]
    assert list(listed) == [bundled.ALIAS, bundled.ENCODER, *cached]
    assert "converted when it is first used" in listed[bundled.ALIAS].state
    assert (listed["ada/small"].family, listed["ada/small"].state) == ("llama", "ready")
    assert listed["ada/small"].bytes == sum(
        file.stat().st_size for file in tiny.rglob("*") if file.is_file()
    )
    assert listed["Bob/bert"].state == "pickles only, which are not loaded"
    assert (listed["cy/chatglm"].family, listed["cy/chatglm"].state) == ("chatglm", "ready")
    assert (listed["di/adapter"].family, listed["di/adapter"].state) == (None, "an adapter")
    assert describe("ada/small").parameters == describe(str(tiny)).parameters
    with pytest.raises(InputError, match="is not a model"):
        describe("di/adapter")


def test_the_command_lists_and_describes(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    said = run_lorakit(tmp_path, "models", "model")
    assert said.returncode == 0, said.stderr
    facts = describe(str(folder))
    assert f"{facts.parameters:,} in float32" in said.stdout
    assert "attention-minimal: q_proj, v_proj (4 modules, 1," in said.stdout
    told = run_lorakit(tmp_path, "models", "model", "--json")
    assert json.loads(told.stdout) == {**facts.to_dict(), "name": "model", "path": "model"}
    every = run_lorakit(tmp_path, "models")
    assert bundled.ALIAS in every.stdout
    assert [one["name"] for one in json.loads(run_lorakit(tmp_path, "models", "--json").stdout)][
        :2
    ] == [bundled.ALIAS, bundled.ENCODER]
