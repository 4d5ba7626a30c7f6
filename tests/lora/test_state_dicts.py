"""An adapter's values as state dictionaries in any wrapping, and others in its place."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from lorakit.errors import InputError
from lorakit.lora.peft_api.hotswap import prepare_model_for_compiled_hotswap


def test_an_adapters_state_is_found_in_whatever_form_it_is_given(build):
    model = wrap(build(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    own = get_peft_model_state_dict(model)
    whole = model.state_dict()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in whole.items()}
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in own.items()}
    inside = {name.replace("model.", "model._orig_mod.", 1): t for name, t in whole.items()}
    both = {f"module._orig_mod.{name}": tensor for name, tensor in own.items()}
    for state in (whole, own, compiled, bare, inside, both):
        found = get_peft_model_state_dict(model, state)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)
    assert get_peft_model_state_dict(model, {}) == {}
    _, *rest = own
    with pytest.raises(InputError, match="state_dict lacks"):
        get_peft_model_state_dict(model, {key: own[key] for key in rest})


WRAPPED = {
    "as it is": lambda key: key,
    "in data parallelism": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("model.", "model._orig_mod.", 1),
    "without the prefix": lambda key: key.removeprefix("base_model.model."),
    "both": lambda key: f"module._orig_mod.{key.removeprefix('base_model.model.')}",
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapters_state_is_set_whatever_wrapped_the_model(
    build, ids, tmp_path: Path, compiled: bool, injected: bool
):
    other = wrap(build(), seed=8, target_modules=["q_proj"])
    other.save_pretrained(tmp_path)
    expected, own = output(other, ids), get_peft_model_state_dict(other)
    base = torch.compile(build(), backend="eager") if compiled else build()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = inject_adapter_in_model(config, base) if injected else get_peft_model(base, config)
    before = get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    for how, wrapped in WRAPPED.items():
        found = set_peft_model_state_dict(model, {wrapped(k): t for k, t in own.items()})
        assert (found.missing_keys, found.unexpected_keys) == ([], []), how
        torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-10)
        set_peft_model_state_dict(model, before)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-6)
    _, *rest = (f"module.{key}" for key in own)
    found = set_peft_model_state_dict(model, {k: own[k.removeprefix("module.")] for k in rest})
    assert (len(found.missing_keys), found.unexpected_keys) == (1, [])


def test_embeddings_of_another_size_are_left_out_where_that_is_asked_for(build, tmp_path: Path):
    larger = build()
    larger.resize_token_embeddings(44, mean_resizing=False)
    source = wrap(larger, target_modules=["q_proj"])
    source.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match="have another shape: left out"):
        loaded = PeftModel.from_pretrained(build(), tmp_path, ignore_mismatched_sizes=True)
    own = get_peft_model_state_dict(source, save_embedding_layers=False)
    for model in (loaded, wrap(build(), target_modules=["q_proj"])):
        state = get_peft_model_state_dict(source, save_embedding_layers=True)
        with pytest.raises(InputError, match="another base model"):
            set_peft_model_state_dict(model, state)
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        for key, tensor in get_peft_model_state_dict(model).items():
            assert torch.equal(tensor, own[key])


class OwnModel(nn.Module):
    """A module of one's own, without a configuration, with a module named like its embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(40, 8)
        self.words_of_others = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(self.words(input_ids) + self.words_of_others(input_ids)),)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def test_an_embedding_in_an_adapters_file_replaces_that_of_a_module_of_ones_own(tmp_path: Path):
    source, target = OwnModel(1), OwnModel(2)
    others = target.words_of_others.weight.clone()
    wrap(source, target_modules=["head"]).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match="brings its own words weight"):
        PeftModel.from_pretrained(target, tmp_path)
    assert torch.equal(target.words.weight, source.words.weight)
    assert torch.equal(target.words_of_others.weight, others)


def test_an_embedding_of_another_base_is_refused_and_nothing_is_changed(build, tmp_path: Path):
    wrap(build(), target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    other = build()
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 1
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(InputError, match="for another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_an_adapter_of_other_first_factors_is_not_swapped_in(build, ids, tmp_path: Path):
    wrap(build(), target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    olora = wrap(build(), target_modules=["q_proj"], init_lora_weights="olora")
    olora.save_pretrained(tmp_path / "olora")
    plain = wrap(build(), target_modules=["q_proj"])
    for model, folder in ((olora, "plain"), (plain, "olora")):
        before = output(model, ids)
        with pytest.raises(InputError, match="starts from other factors"):
            hotswap_adapter(model, tmp_path / folder, "default")
        assert torch.equal(output(model, ids), before)
    again = wrap(build(), target_modules=["q_proj"], init_lora_weights="olora")
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.add_(1 if "lora_B" in name else 0)
    hotswap_adapter(again, tmp_path / "olora", "default")
    torch.testing.assert_close(output(again, ids), output(olora, ids), rtol=0, atol=1e-6)


SWAPS = [
    ({"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 3}),
    ({"r": 8, "lora_alpha": 3}, {"r": 4, "use_rslora": True}),
    ({"r": 4}, {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    ({"r": 4}, {"r": 4, "rank_pattern": {"q_proj": 6}, "target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize(("own", "new"), SWAPS)
def test_what_was_swapped_in_is_saved_with_its_own_ranks_and_scalings(
    build, ids, tmp_path: Path, own: dict, new: dict
):
    targets = {"target_modules": ["q_proj", "v_proj"]}
    source = wrap(build().float(), seed=8, **targets | new)
    source.save_pretrained(tmp_path / "new")
    expected = output(source, ids)
    model = wrap(build().float(), **targets | own)
    hotswap_adapter(model, tmp_path / "new", "default")
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    for reader in (PeftModel, peft.PeftModel):
        again = reader.from_pretrained(build().float(), str(tmp_path / "again"))
        torch.testing.assert_close(output(again, ids), expected, rtol=0, atol=1e-5)


def test_experts_are_swapped_by_their_own_ranks_and_scalings(build, ids, tmp_path: Path):
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    fields = {"target_modules": ["q_proj"], "r": 4, **experts}
    patterns = {"experts.down_proj": 2}
    other = {"lora_alpha": 3, "rank_pattern": patterns, "alpha_pattern": patterns}
    source = wrap(build("mixtral"), seed=8, **fields | other)
    source.save_pretrained(tmp_path / "new")
    expected = output(source, ids)
    for prepared in (False, True):
        model = wrap(build("mixtral"), **fields)
        if prepared:
            before = output(model, ids)
            prepare_model_for_compiled_hotswap(model, target_rank=6)
            torch.testing.assert_close(output(model, ids), before, rtol=0, atol=1e-10)
        hotswap_adapter(model, tmp_path / "new", "default")
        model.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(build("mixtral"), tmp_path / "again")
        for each in (model, again):
            torch.testing.assert_close(output(each, ids), expected, rtol=0, atol=1e-6)


def test_an_adapter_that_was_prepared_for_swapping_is_saved_with_its_rank(
    build, ids, tmp_path: Path
):
    model = wrap(build().float(), target_modules=["q_proj"], r=4, lora_alpha=6)
    expected = output(model, ids)
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build().float(), tmp_path)
    torch.testing.assert_close(output(again, ids), expected, rtol=0, atol=1e-5)


def test_what_the_old_adapter_trained_whole_must_be_in_the_new_one(build, ids, tmp_path: Path):
    wrap(build(), target_modules=["q_proj"], r=12).save_pretrained(tmp_path)
    model = wrap(build(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = output(model, ids)
    with pytest.raises(InputError, match=r"has no .*lm_head\.weight"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(output(model, ids), before)
    assert model.peft_config["default"].r == 8
