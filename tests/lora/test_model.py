"""A model and its bank of adapters: putting in, choosing, taking out, and every refusal."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import LoraConfig, LoraModel, PeftModel
from lorakit.errors import InputError


def snapshot(model: nn.Module) -> dict[str, tuple[type, bytes]]:
    """Every module's type and every tensor's bytes, by name."""
    kinds = {f"module {n}": (type(m), b"") for n, m in model.named_modules()}
    return kinds | {
        name: (type(t), t.detach().numpy().tobytes()) for name, t in model.state_dict().items()
    }


def test_unloading_leaves_the_model_as_it_was(build):
    model = build()
    before = snapshot(model)
    wrapped = wrap(model, target_modules="all-linear", modules_to_save=["lm_head"])
    wrapped.merge_adapter()
    assert wrapped.unload() is model
    assert snapshot(model) == before


def test_a_configuration_that_fails_leaves_the_model_as_it_was(build):
    model = build()
    before = snapshot(model)
    for fields in ({"target_modules": ["q_proj", "nope"]}, {"modules_to_save": ["nope"]}):
        with pytest.raises(InputError, match="'nope' matches no module"):
            LoraModel(model, LoraConfig(**fields))
        assert snapshot(model) == before


def test_a_second_adapter_changes_nothing_of_the_first(build, ids, tmp_path: Path):
    wrapped = wrap(build(), target_modules=["q_proj", "embed_tokens"])
    expected = output(wrapped, ids)
    wrap(build(), seed=8, target_modules="all-linear", r=2).save_pretrained(tmp_path)
    wrapped.load_adapter(tmp_path, "second")
    assert wrapped.active_adapters == ["default"]
    assert torch.equal(output(wrapped, ids), expected)
    wrapped.delete_adapter("second")
    assert wrapped.adapters == ["default"]
    assert torch.equal(output(wrapped, ids), expected)


def test_an_adapter_that_does_not_load_leaves_the_others_alone(build, ids, tmp_path: Path):
    wrapped = wrap(build(), target_modules=["q_proj"])
    names = {name for name, _ in wrapped.named_parameters()}
    wrap(build(), target_modules=["v_proj"]).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(InputError, match=r"v_proj.lora_A.weight has shape \(8, 16\).*\(5, 16\)"):
        wrapped.load_adapter(tmp_path, "second")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged or cut off"):
        wrapped.load_adapter(tmp_path, "second")
    assert wrapped.adapters == ["default"]
    assert wrapped.active_adapters == ["default"]
    assert names == {name for name, _ in wrapped.named_parameters()}


def test_rows_of_a_batch_have_their_own_adapters_with_gradients(build, ids):
    wrapped = wrap(build(), target_modules=["q_proj"], r=3)
    wrapped.add_adapter(
        "other",
        LoraConfig(r=5, use_rslora=True, target_modules="all-linear", init_lora_weights=False),
    )
    names = ["other", "default", "other"]
    wrapped.set_requires_grad(["default", "other"])
    output(wrapped, ids, adapter_names=names).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    for i, name in enumerate(names):
        wrapped.set_adapter(name)
        output(wrapped, ids[i : i + 1]).square().sum().backward()
    alone = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    for name, grad in alone.items():
        assert (grad - mixed[name]).abs().max() / (1 + grad.abs().max()) < 1e-10, name


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_an_adapter_each_gives_what_each_gives_alone(build, ids, beams: int):
    wrapped = wrap(build(), target_modules="all-linear", r=3, lora_alpha=16)
    wrapped.add_adapter("other", LoraConfig(r=5, init_lora_weights=False, lora_alpha=32))
    names = ["other", "__base__", "default"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    mixed = wrapped.generate(ids, adapter_names=names, **options)
    options.pop("attention_mask")
    rows = []
    for i, name in enumerate(names):
        alone = wrapped.generate(ids[i : i + 1], adapter_names=[name], **options)
        assert torch.equal(mixed[i], alone[0]), name
        rows.append(tuple(alone[0, 7:].tolist()))
    assert len(set(rows)) > 1


def test_names_of_rows_are_checked(build, ids):
    wrapped = wrap(build())
    with pytest.raises(
        InputError, match="Adapter defualt does not exist \\(did you mean 'default'"
    ):
        output(wrapped, ids, adapter_names=["defualt"] * 3)
    with pytest.raises(InputError, match="adapter_names is empty"):
        output(wrapped, ids, adapter_names=[])
    with pytest.raises(ValueError, match="2 names for a batch of 3 rows"):
        output(wrapped, ids, adapter_names=["default", "__base__"])
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="unmerge first"):
        output(wrapped, ids, adapter_names=["default"] * 3)


def test_leaving_the_adapter_out_is_the_base_also_when_it_is_merged(build, ids):
    base = build()
    expected = output(base, ids)
    wrapped = wrap(copy.deepcopy(base), target_modules="all-linear")
    tuned = output(wrapped, ids)
    wrapped.merge_adapter()
    merged = output(wrapped, ids)
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped, ids), expected)
    assert torch.equal(output(wrapped, ids), merged)
    wrapped.unmerge_adapter()
    assert torch.equal(output(wrapped, ids), tuned)
    wrapped.set_adapter([])
    assert torch.equal(output(wrapped, ids), expected)


def test_a_tied_head_stays_as_it_is_when_the_embedding_is_merged(build, ids, tmp_path: Path):
    from transformers import GPT2LMHeadModel

    wrapped = wrap(build("gpt2"), target_modules=["wte"])
    expected = output(wrapped, ids)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(output(merged, ids), expected, rtol=0, atol=1e-10)
    merged.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).double().eval()
    torch.testing.assert_close(output(again, ids), expected, rtol=0, atol=1e-10)


def test_only_the_active_adapters_are_trainable(build):
    wrapped = wrap(build(), target_modules=["q_proj"])
    wrapped.add_adapter("other", LoraConfig(target_modules=["q_proj"]))

    def trained() -> set[str]:
        return {n.split(".")[-2] for n, p in wrapped.named_parameters() if p.requires_grad}

    assert trained() == {"default"}
    wrapped.set_adapter("other")
    assert trained() == {"other"}
    wrapped.set_adapter(["default", "other"])
    assert trained() == {"default", "other"}
    wrapped.set_adapter("default", inference_mode=True)
    assert trained() == set()


def test_a_model_can_be_copied_and_pickled(build, ids):
    wrapped = wrap(build())
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(output(other, ids), output(wrapped, ids))
        other.set_adapter([])
        assert not torch.equal(output(other, ids), output(wrapped, ids))


def test_gradient_checkpointing_gives_the_same_gradients(build, ids):
    grads = []
    for checkpointing in (False, True):
        wrapped = wrap(build(), target_modules="all-linear")
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.train()
        output(wrapped, ids).square().sum().backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_any_module_can_be_wrapped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = wrap(model, target_modules="all-linear", r=2)
    x = torch.randn(3, 4)
    with wrapped.disable_adapter():
        base = wrapped(x)
    assert not torch.equal(wrapped(x), base)
    assert wrapped.peft_config["default"].target_modules == ["0", "2"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_porj"]}, ["'q_porj'", "did you mean 'q_proj'", "down_proj"]),
        ({"target_modules": ["q_proj", "nope"]}, ["'nope' matches no module"]),
        ({"target_modules": "no.*"}, ["expression 'no.*' matches no module"]),
        ({"target_modules": ["self_attn"]}, ["self_attn", "LlamaAttention", "LoRA applies to"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["leave out"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, ["leave out"]),
        ({"modules_to_save": ["lm_hed"]}, ["'lm_hed'", "did you mean 'lm_head'"]),
    ],
)
def test_targets_that_match_nothing_are_named(build, fields, words):
    with pytest.raises(InputError) as error:
        wrap(build(), **fields)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "__base__"])
def test_names_that_cannot_be_keys_are_refused(build, name: str):
    with pytest.raises(InputError, match="cannot be an adapter's name"):
        LoraModel(build(), LoraConfig(), name)


@pytest.mark.parametrize("name", ["lora", "weight", "lora_A", "modules_to_save", "base_layer"])
def test_an_adapter_may_have_a_confusing_name(build, ids, tmp_path: Path, name: str):
    wrapped = LoraModel(build(), LoraConfig(init_lora_weights=False), name)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path / name, adapter_name=name)
    assert torch.equal(output(again, ids), output(wrapped, ids))


def test_a_wrapped_model_is_not_wrapped_twice_and_names_are_not_given_twice(build):
    model = build()
    wrapped = wrap(model)
    with pytest.raises(InputError, match="has adapters already"):
        wrap(model)
    with pytest.raises(InputError, match="'default' already"):
        wrapped.add_adapter("default", LoraConfig())
    with pytest.raises(InputError, match="Adapter x does not exist"):
        wrapped.set_adapter("x")


def test_damaged_folders_are_refused_with_one_line(build, tmp_path: Path):
    whole = tmp_path / "whole"
    wrap(build()).save_pretrained(whole)

    def broken(change) -> str:
        folder = shutil.copytree(whole, tmp_path / "broken")
        change(folder)
        with pytest.raises(InputError) as error:
            PeftModel.from_pretrained(build(), folder)
        shutil.rmtree(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    config, weights = "adapter_config.json", "adapter_model.safetensors"
    assert "no adapter_config.json" in broken(lambda f: (f / config).unlink())
    assert "no adapter_model.safetensors" in broken(lambda f: (f / weights).unlink())
    assert "is damaged" in broken(lambda f: (f / weights).rename(f / "adapter_model.bin"))
    assert "not readable JSON" in broken(lambda f: (f / config).write_text("{"))
    assert "one JSON object" in broken(lambda f: (f / config).write_text("[]"))

    def set_field(**fields):
        values = json.loads((whole / config).read_text()) | fields
        return lambda f: (f / config).write_text(json.dumps(values))

    assert "lorakit has LORA only" in broken(set_field(peft_type="IA3"))
    assert "lacks" in broken(set_field(use_dora=True))
    assert "arrow_config" in broken(set_field(arrow_config={"top_k": 3}))
    assert "r must be a whole number" in broken(set_field(r="eight"))

    def not_a_number(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / weights)
        next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, folder / weights)

    assert "NaN or Inf" in broken(not_a_number)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
        ("conv", {"target_modules": ["one", "two"], "lora_bias": True}),
        ("gpt-oss", {"target_parameters": ["experts.gate_up_proj"]}),
    ],
)
def test_a_hundred_merges_of_a_model_in_bfloat16_change_no_byte(build, family, fields):
    base = build(family).bfloat16()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = wrap(base, **fields)
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
