"""Base models that are quantised while they are loaded, and what adapters do beside them."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

import lorakit
from answered import tokens
from chatglm_folders import write_original
from command import run_lorakit
from gguf_models import save_family
from lorakit.adapters.export.gguf_files import write_gguf
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora.parameters import count_parameters
from lorakit.models.fingerprint import fingerprint
from lorakit.models.load import load_for_task
from lorakit.models.quantization.prepare import prepare_model_for_kbit_training
from lorakit.models.quantization.settings import Quantization, as_quantization
from lorakit.weight_formats import dequantized
from matrix import few
from plain_adapters import save_adapter
from small_runs import recipe, weights
from sweeps.shared_sweeps import configurations, distance, runner_for, small, solo
from tiny import save_tiny_encoder

KINDS = ["nf4", "fp4", "int8"]
TEXT = "Paris is the capital of France."


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"what is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    return path


def quantised(model: Any) -> list[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


def rounded_by_hand(path: Path, kind: str) -> Any:
    """The plain model with what the quantised weights stand for in the place of its own."""
    model, _ = lorakit.load_model(str(path), "float32", quantization=kind)
    plain, tokenizer = lorakit.load_model(str(path), "float32")
    for name in quantised(model):
        layer = model.get_submodule(name)
        plain.get_submodule(name).weight.data = dequantized(layer.weight, layer)
    return plain, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_computes_with_what_its_weights_stand_for(tiny_model: Path, kind: str):
    model, tokenizer = lorakit.load_model(str(tiny_model), "float32", quantization=kind)
    names = quantised(model)
    assert len(names) == 14  # seven in each of two layers, and not the head
    whole, _ = lorakit.load_model(str(tiny_model), "float32")
    assert fingerprint(model) == fingerprint(whole)
    assert count_parameters(model)[1] == count_parameters(whole)[1]
    exact, _ = rounded_by_hand(tiny_model, kind)
    adapted = lorakit.get_peft_model(model, lorakit.LoraConfig(target_modules="all-linear"))
    found = logits(adapted.eval(), tokenizer)
    torch.testing.assert_close(found, logits(exact, tokenizer), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(whole, tokenizer), atol=1e-4)


def test_scales_and_dtype_of_products_are_as_asked(tiny_model: Path):
    for double in (True, False):
        settings = {"type": "nf4", "double_quantization": double, "compute_dtype": "bfloat16"}
        model, _ = lorakit.load_model(str(tiny_model), "float32", quantization=settings)
        layer = model.get_submodule(quantised(model)[0])
        assert layer.weight.quant_state.nested is double
        assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", few(KINDS, "int8"))
def test_a_run_is_recorded_opened_as_it_was_trained_and_merged_exactly(
    tiny_model: Path, rows: Path, tmp_path: Path, kind: str
):
    values = recipe(tiny_model, rows, tmp_path / "run") | {"quantization": kind}
    result = lorakit.train(values, quiet=True)
    manifest = read_manifest(result.output_dir)
    assert manifest.eval_loss < manifest.base_eval_loss
    assert manifest.recipe["quantization"]["type"] == kind
    assert manifest.recipe["training"]["activation_checkpointing"] is True
    assert "activation_checkpointing" in str(manifest.advice)
    whole, tokenizer = lorakit.load_model(str(tiny_model), "float32")
    assert manifest.base_fingerprint == fingerprint(whole)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_adapter(result.output_dir, dtype="float32")
        bare = open_adapter(result.output_dir, dtype="float32", quantization="none")
    assert len(quantised(opened.model)) == 14
    assert not quantised(bare.model)

    report = lorakit.merge(result.output_dir, tmp_path / "merged")
    assert report.passed
    assert f"quantised to {kind}" in report.notices[0]
    merged, _ = lorakit.load_model(str(tmp_path / "merged"), "float32")
    assert not quantised(merged)
    assert getattr(merged.config, "quantization_config", None) is None
    torch.testing.assert_close(
        logits(merged, tokenizer), logits(opened.model, tokenizer), rtol=1e-4, atol=1e-4
    )
    onto_whole = lorakit.merge(result.output_dir, tmp_path / "whole", quantization="none")
    assert onto_whole.streamed
    plain, _ = lorakit.load_model(str(tmp_path / "whole"), "float32")
    torch.testing.assert_close(
        logits(plain, tokenizer), logits(bare.model, tokenizer), rtol=1e-4, atol=1e-4
    )


def test_training_beside_a_quantised_base_is_training_beside_its_rounded_weights(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    plain, tokenizer = rounded_by_hand(tiny_model, "nf4")
    plain.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    found = []
    for name, model, quantization in [
        ("quantised", tiny_model, "nf4"),
        ("plain", tmp_path / "rounded", None),
    ]:
        values = recipe(model, rows, tmp_path / name, learning_rate=1e-3)
        found.append(lorakit.train(values | {"quantization": quantization}, quiet=True).output_dir)
    assert distance(*map(weights, found)) < 2e-3


@pytest.mark.exhaustive
def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", save_steps=2) | {"quantization": "nf4"}
    folder = lorakit.train(values, quiet=True).output_dir
    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-6")
    lorakit.train(values, resume=True, quiet=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.exhaustive
def test_configurations_together_give_the_weights_of_their_solo_runs(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=4) | {"quantization": "nf4"}
    changes = [{"lora.r": 2}, {"lora.r": 5, "lora.lora_dropout": 0.2}, {"lora.use_dora": True}]
    sweep = configurations(values, tmp_path / "sweep", changes)
    runner_for(values, at_once=len(sweep)).advance(sweep, 1.0)
    for configuration in sweep:
        own = weights(Path(configuration.recipe.output_dir))
        assert distance(own, solo(configuration, tmp_path / "solo")) < 2e-3, configuration.changes


@pytest.mark.parametrize("kind", few(KINDS, "int8"))
def test_an_engine_answers_beside_the_quantised_base(tiny_model: Path, tmp_path: Path, kind: str):
    names = {"plain": {"r": 4}, "rslora": {"r": 2, "use_rslora": True}}
    folders = {
        name: save_adapter(tiny_model, tmp_path / name, target_modules="all-linear", **fields)
        for name, fields in names.items()
    }
    sampling = Sampling(max_new_tokens=8, logprobs=0)
    answers = {}
    engine = open_engine(str(tiny_model), folders, dtype="float32", quantization=kind)
    try:
        prompt = engine.tokenizer(TEXT).input_ids
        for name in (None, *folders):
            answers[name] = tokens(engine.submit(prompt, name, sampling))
    finally:
        engine.close()
    assert len({tuple(answer) for answer in answers.values()}) > 1
    for name, folder in folders.items():
        opened = open_adapter(folder, dtype="float32", quantization=kind)
        ids = torch.tensor([prompt])
        expected = opened.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert answers[name] == expected[0, len(prompt) :].tolist()


def test_adapters_of_different_bases_need_a_word(tiny_model: Path, rows: Path, tmp_path: Path):
    for name, quantization in (("four", "nf4"), ("whole", None)):
        values = recipe(tiny_model, rows, tmp_path / name, max_steps=1)
        lorakit.train(values | {"quantization": quantization}, quiet=True)
    both = {name: tmp_path / name for name in ("four", "whole")}
    with pytest.raises(InputError, match=r"different ways \(.*four beside nf4.*whole beside none"):
        open_engine(None, both)
    with pytest.raises(InputError, match="--quantization none"):
        lorakit.merge(list(both.values()), tmp_path / "merged")
    engine = open_engine(None, both, quantization="none")
    engine.close()
    assert not engine.notices
    alone = open_engine(None, {"four": tmp_path / "four"})
    alone.close()
    assert "quantised to nf4, as it was for training" in alone.notices[0]


@pytest.mark.parametrize("kind", few(KINDS, "nf4"))
def test_a_classifiers_new_head_stays_whole(tmp_path: Path, kind: str):
    encoder = save_tiny_encoder(tmp_path / "encoder", pooler=False)
    labels = ("a", "b")
    loaded = load_for_task("SEQ_CLS", str(encoder), "float32", labels=labels, quantization=kind)
    assert loaded.new_modules == ["classifier", "bert.pooler.dense"]
    names = quantised(loaded.model)
    assert names
    assert all(name.startswith("bert.encoder.") for name in names)
    plain = load_for_task("SEQ_CLS", str(encoder), "float32", labels=labels)
    for path in loaded.new_modules:
        own, other = (m.model.get_submodule(path).state_dict() for m in (loaded, plain))
        assert all(torch.equal(own[key], other[key]) for key in other)


@pytest.mark.parametrize("kind", few(KINDS, "nf4"))
def test_chatglms_original_layout_is_quantised_as_it_is_read(tmp_path: Path, kind: str):
    folder = write_original(tmp_path / "chatglm3-6b")
    model, tokenizer = lorakit.load_model(str(folder), "float32", quantization=kind)
    assert len(quantised(model)) == 12  # gate and up are one
    exact, _ = rounded_by_hand(folder, kind)
    adapted = lorakit.get_peft_model(model, lorakit.LoraConfig(target_modules="all-linear"))
    torch.testing.assert_close(
        logits(adapted.eval(), tokenizer), logits(exact, tokenizer), rtol=1e-4, atol=1e-4
    )


def test_a_gguf_file_is_unpacked_and_quantised(tmp_path: Path):
    folder = save_family(tmp_path / "llama", "llama", "smollm")
    write_gguf(folder, tmp_path / "llama.gguf", "float32", "llama")
    file = str(tmp_path / "llama.gguf")
    model, tokenizer = lorakit.load_model(file, "float32", quantization="int8")
    assert len(quantised(model)) == 14
    whole, _ = lorakit.load_model(file, "float32")
    for name in quantised(model):
        layer, weight = model.get_submodule(name), whole.get_submodule(name).weight
        rounded = dequantized(layer.weight, layer)
        assert (rounded - weight).abs().max() <= weight.abs().max() / 200
    assert fingerprint(model) is None  # whose shapes and names only transformers knows
    adapter = save_adapter(file, tmp_path / "adapter", target_modules="all-linear")
    opened = open_adapter(adapter, dtype="float32", quantization="nf4")
    assert quantised(opened.model)
    assert logits(opened.model, tokenizer).isfinite().all()


def test_prepared_for_a_trainer_of_ones_own(tiny_model: Path):
    model, tokenizer = lorakit.load_model(str(tiny_model), "float32", quantization="nf4")
    model = lorakit.prepare_model_for_kbit_training(model)
    assert model.is_activation_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    model = lorakit.get_peft_model(model, lorakit.LoraConfig(target_modules="all-linear")).train()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert sum(p.grad.abs().sum() for p in trained) > 0
    whole = lorakit.load_model(str(tiny_model), "bfloat16", quantization="nf4")[0]
    again = prepare_model_for_kbit_training(whole, use_gradient_checkpointing=False)
    assert not again.is_activation_checkpointing
    dtypes = {name: p.dtype for name, p in again.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.uint8}  # as PEFT's leaves them
    assert dtypes["model.norm.weight"] == dtypes["model.embed_tokens.weight"] == torch.float32
    assert logits(again, tokenizer).isfinite().all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nf5", r"'nf5' is not one of nf4, fp4, int8 \(did you mean 'nf4'"),
        (4, "should be one of nf4, fp4, int8, or a mapping"),
        ({"double_quantization": True}, "quantization.type is missing"),
        ({"type": "nf4", "dobule_quantization": 1}, "did you mean 'double_quantization'"),
        ({"type": "nf4", "double_quantization": "yes"}, "should be true or false"),
        ({"type": "nf4", "compute_dtype": "float8"}, "compute_dtype should be one of"),
        ({"type": "int8", "double_quantization": True}, "leave them out with int8"),
        ({"type": ["nf4"]}, "is not one of nf4, fp4, int8"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    value: Any, message: str, tiny_model: Path, rows: Path, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        as_quantization(value)
    with pytest.raises(InputError, match=message):
        lorakit.train(recipe(tiny_model, rows, tmp_path / "run") | {"quantization": value})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compile": True}, "compile cannot be true with quantization"),
        ({"dtype": "float64"}, "quantization has no float64"),
        ({"training": {"fsdp": "full_shard"}}, "training.fsdp does not spread quantised weights"),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: dict[str, Any], message: str, tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run") | {"quantization": "nf4"} | more
    with pytest.raises(InputError, match=message):
        lorakit.train(values)


def test_a_base_that_is_quantised_already_is_not_quantised_again(tiny_model: Path, tmp_path: Path):
    model, tokenizer = lorakit.load_model(str(tiny_model), "float32", quantization="nf4")
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(InputError, match="quantised already"):
        lorakit.load_model(str(tmp_path / "packed"), quantization="int8")
    again, _ = lorakit.load_model(str(tmp_path / "packed"), "float32")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


def test_without_its_package_the_command_to_install_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"nf4 needs bitsandbytes: pip install 'lorakit\[quant\]'"):
        lorakit.load_model(str(tiny_model), quantization="nf4")


def test_the_command_line_trains_generates_scores_and_merges(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=2) | {"quantization": "nf4"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    trained = run_lorakit(tmp_path, "train", "recipe.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "activation_checkpointing=True" in trained.stdout + trained.stderr
    for arguments in (
        ("generate", "run", "--prompts", "rows.jsonl", "--max-new-tokens", "2"),
        ("eval", "run", "--data", "rows.jsonl", "--limit", "2", "--max-new-tokens", "2"),
        ("merge", "run", "-o", "merged"),
        ("merge", "run", "-o", "whole", "--quantization", "none"),
    ):
        done = run_lorakit(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        said = "quantised to nf4" in done.stderr
        assert said == (arguments[0] in ("generate", "merge") and "none" not in arguments)
    wrong = run_lorakit(tmp_path, "merge", "run", "-o", "other", "--quantization", "nf3")
    assert wrong.returncode == 2
    assert "'nf3' is not one of nf4" in wrong.stderr
    assert Quantization("nf4") == as_quantization("nf4")
