"""Experts' parameters, single tokens, and heads that are tied to an embedding."""

import copy
from typing import Any

import pytest
import torch

from families import Attention, output, to_peft, wrap
from lorakit import LoraConfig, PeftModel
from lorakit.errors import InputError
from lorakit.lora.wrapping import wrapped_modules

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"target_parameters": EXPERTS}),
    "transposed experts": ("gpt-oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "tied tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied copy": (
        "tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}
every_case = pytest.mark.parametrize(("family", "fields"), CASES.values(), ids=CASES.keys())


def scramble(model: torch.nn.Module) -> None:
    """Random values for what starts from the base's own."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter)


@every_case
def test_rows_merging_and_unloading_agree(build, ids, family: str, fields: dict[str, Any]):
    base = build(family)
    model = wrap(copy.deepcopy(base), **fields)
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(**{**fields, "init_lora_weights": False, "r": 3}))
    scramble(model)
    names = ["other", "__base__", "default"]
    mixed = output(model, ids, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        torch.testing.assert_close(output(model, ids)[i], mixed[i], rtol=0, atol=1e-10)
    expected = output(model, ids)
    assert (expected - output(base, ids)).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, ids), expected, rtol=0, atol=1e-10)
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    bare = model.unload()
    for (name, ours), (_, theirs) in zip(
        bare.named_parameters(), base.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@every_case
def test_files_go_to_peft_and_back(build, ids, tmp_path, family: str, fields: dict[str, Any]):
    base = build(family)
    model = wrap(copy.deepcopy(base), **fields)
    scramble(model)
    theirs = to_peft(model, base, tmp_path / "ours")
    expected = output(model, ids)
    torch.testing.assert_close(output(theirs, ids), expected, rtol=0, atol=1e-10)
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(output(back, ids), expected, rtol=0, atol=1e-10)


def test_merged_tied_weights_are_still_one_after_saving_and_loading(build, ids, tmp_path):
    for case in ("tied tokens", "tied embedding", "tied copy"):
        model = wrap(build("tied"), **CASES[case][1])
        scramble(model)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight, case
        merged.save_pretrained(tmp_path / case)
        again = type(merged).from_pretrained(tmp_path / case, dtype=torch.float64)
        assert torch.equal(output(again, ids), output(merged, ids)), case


def test_an_embedding_alone_is_adapted_apart_from_its_head_and_they_merge_apart(build, ids):
    model = wrap(build("tied"), target_modules=["embed_tokens"])
    expected = output(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, ids), expected, rtol=0, atol=1e-10)
    assert merged.config.tie_word_embeddings is False


def test_two_adapters_of_the_same_token_are_not_added_up(build, ids):
    fields = {"target_modules": ["q_proj"]}
    model = wrap(build(), trainable_token_indices=[1, 3], **fields)
    model.add_adapter("apart", LoraConfig(trainable_token_indices=[5], **fields))
    model.add_adapter("other", LoraConfig(trainable_token_indices=[3], **fields))
    model.set_adapter(["default", "apart"])
    output(model, ids)
    with pytest.raises(InputError, match="default, other train some of the same tokens"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "apart"]
    with pytest.raises(InputError, match="train some of the same tokens"):
        model.merge_adapter(["default", "other"])
    assert not any(getattr(m, "merged", False) for _, m in wrapped_modules(model))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": [40]}, "different numbers below 40"),
        ({"trainable_token_indices": [1, 1]}, "different numbers below 40"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "did you mean 'embed_tokens'"),
        ({"target_parameters": ["experts.gate_up"]}, "matches no parameter"),
        ({"target_parameters": ["norm.weight"]}, "has 1 dimensions"),
        ({"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}, "as a whole"),
        ({"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "as a whole"),
    ],
)
def test_what_does_not_fit_is_said_and_leaves_the_model_as_it_was(build, fields, words):
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=words):
        wrap(model, **{"target_modules": ["q_proj"], **fields})
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_that_of_merged_weights_and_peft_counts_the_output_twice(
    ids, tmp_path, batch_first: bool
):
    torch.manual_seed(0)
    base = Attention(batch_first).double().eval()
    model = wrap(copy.deepcopy(base), target_modules=["attention"], lora_alpha=3)
    expected = copy.deepcopy(base)
    layer = model.get_base_model().attention
    update = layer.base_layer.out_proj.get_delta_weight("default")
    with torch.no_grad():
        expected.attention.in_proj_weight += layer.get_delta_weight("default")
        expected.attention.out_proj.weight += update
    torch.testing.assert_close(output(model, ids), output(expected, ids), rtol=0, atol=1e-10)
    theirs = to_peft(model, base, tmp_path)
    with torch.no_grad():
        expected.attention.out_proj.weight += update
    torch.testing.assert_close(output(theirs, ids), output(expected, ids), rtol=0, atol=1e-10)


def test_trained_tokens_reach_all_modules_that_are_tied(build, ids, tmp_path):
    base = build("t5")
    model = wrap(copy.deepcopy(base), target_modules=["q"], trainable_token_indices=[1, 5])
    rows = [tensor for key, tensor in model.adapter_tensors("default").items() if "token" in key]
    assert len(rows) == 1
    before = output(model, ids)
    with torch.no_grad():
        rows[0].normal_()
    tuned = output(model, ids)
    assert not torch.allclose(tuned, before)
    ids_without = torch.where((ids == 1) | (ids == 5), 7, ids)
    encoder = model.get_base_model().get_encoder()
    plain = copy.deepcopy(base).get_encoder()
    with model.disable_adapter():
        torch.testing.assert_close(encoder(ids)[0], plain(ids)[0], rtol=0, atol=1e-12)
    assert ((encoder(ids)[0] - encoder(ids_without)[0]).abs() > 1e-9).any()
    theirs = to_peft(model, base, tmp_path)
    torch.testing.assert_close(output(theirs, ids), tuned, rtol=0, atol=1e-10)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, ids), tuned, rtol=0, atol=1e-10)
    assert merged.lm_head.weight is merged.shared.weight is merged.encoder.embed_tokens.weight


@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_what_is_tied_to_an_adapted_embedding_follows_or_is_named(build, ids, field):
    fields = {"target_modules": ["q"], field: ["shared"]}
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        wrap(build("t5"), **fields)
    model = wrap(build("t5"), ensure_weight_tying=True, **fields)
    before = output(model, ids)
    with torch.no_grad():
        for key, tensor in model.adapter_tensors("default").items():
            if "shared" in key:
                tensor.add_(0.3)
    tuned = output(model, ids)
    assert not torch.allclose(tuned, before)
    torch.testing.assert_close(output(model.merge_and_unload(), ids), tuned, rtol=0, atol=1e-9)


def test_a_wish_to_keep_weights_tied_that_changes_nothing_is_said(build):
    with pytest.warns(UserWarning, match="no tied modules were found"):
        wrap(build(), target_modules=["q_proj"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="no tied modules are added"):
        wrap(build("tied"), target_modules=["q_proj"], ensure_weight_tying=True)


EVERY_WAY: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 5]},
        "added": {"target_modules": ["embed_tokens"]},
        "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    },
    "tied": {
        "saved": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 5]},
        "added": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "head": {"target_modules": ["lm_head"]},
    },
    "mixtral": {
        "down": {"target_modules": [], "target_parameters": EXPERTS[1:]},
        "both": {"target_modules": [], "target_parameters": EXPERTS},
        "up": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    },
}


@pytest.mark.parametrize("family", EVERY_WAY)
@pytest.mark.parametrize("order", [1, -1])
def test_adapters_that_adapt_one_module_in_different_ways_stand_beside_each_other(
    build, ids, tmp_path, family: str, order: int
):
    """Each row gets its own adapter's, and files have the names that each has alone."""
    base = build(family)
    alone = {}
    for name, fields in EVERY_WAY[family].items():
        model = wrap(copy.deepcopy(base), **fields)
        scramble(model)
        model.save_pretrained(tmp_path / name)
        alone[name] = output(model, ids)
    names = list(EVERY_WAY[family])[::order]
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, name)
    for i, name in enumerate(names):
        rows = [name, "__base__", names[i - 1]]
        mixed = output(model, ids, adapter_names=rows)
        for at, row in enumerate(rows):
            expected = output(base, ids) if row == "__base__" else alone[row]
            torch.testing.assert_close(mixed[at], expected[at], rtol=0, atol=1e-10)
        model.set_adapter(name)
        torch.testing.assert_close(output(model, ids), alone[name], rtol=0, atol=1e-10)
        model.merge_adapter()
        torch.testing.assert_close(output(model, ids), alone[name], rtol=0, atol=1e-10)
        model.unmerge_adapter()
    if "saved" in names:
        with pytest.raises(InputError, match="one at a time"):
            model.set_adapter(["saved", "added"])
    model.set_adapter([])
    for name in names:
        model.delete_adapter(name)
    assert not list(wrapped_modules(model.get_base_model()))
    assert torch.equal(output(model.get_base_model(), ids), output(base, ids))
