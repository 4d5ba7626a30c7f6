"""A weight takes a part of all that an adapter changes, also of what it has trained whole."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streamed_merges import LINEAR, SMALL, same_bytes, save_adapter, save_base, tensors_in
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from families import make_gpt2, make_llama, make_tied, output, wrap
from lorakit.adapters.in_memory import open_all
from lorakit.adapters.job import prepare
from lorakit.errors import InputError
from lorakit.lora.layers import LoraLayer
from matrix import few
from tiny import save_tiny_encoder

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (make_llama, LINEAR),
    "DoRA": (make_llama, {**LINEAR, "use_dora": True}),
    "Conv1D, DoRA": (make_gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
    "embedding, DoRA": (make_llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved module": (make_llama, {**SMALL, "modules_to_save": ["o_proj", "norm", "lm_head"]}),
    "tied, saved": (make_tied, {**SMALL, "modules_to_save": ["lm_head"]}),
    "tied, both saved": (
        make_tied,
        {**SMALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": (make_llama, {**SMALL, "trainable_token_indices": [3, 7]}),
    "tied tokens": (make_tied, {**SMALL, "trainable_token_indices": [3, 7]}),
    "bias of adapted layers": (make_llama, {**LINEAR, "bias": "lora_only"}),
    "all biases": (make_llama, {**SMALL, "bias": "all"}),
    "all biases and lora_bias": (make_llama, {**SMALL, "bias": "all", "lora_bias": True}),
}

USUAL = ("DoRA", "tied tokens", "all biases and lora_bias")


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_low_rank(name: str, fields: dict[str, Any]) -> bool:
    """Whether the tensor is changed by factors, whose sums are rounded otherwise."""
    targets = fields["target_modules"]
    if targets == "all-linear":
        return name.endswith("proj.weight")
    ends = ["weight", "bias"] if "lora_bias" in fields else ["weight"]
    return name.endswith(tuple(f"{target}.{end}" for target in targets for end in ends))


@pytest.mark.parametrize("weight", few([0.3, -0.7], 0.3))
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("case", few(list(CASES), *USUAL))
def test_both_ways_of_merging_go_the_same_part_of_the_way(
    case: str, dtype: torch.dtype, weight: float, tmp_path: Path
):
    make, fields = CASES[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    lorakit.merge(adapter, tmp_path / "all", dtype="float32", verify=False)
    for name, in_memory in (("streamed", False), ("loaded", True)):
        report = lorakit.merge(
            adapter, tmp_path / name, weights=[weight], in_memory=in_memory, verify=False
        )
        assert report.streamed is not in_memory
    same_bytes(tmp_path / "streamed", tmp_path / "loaded")
    before, after, merged = (tensors_in(tmp_path / f) for f in ("base", "all", "streamed"))
    changed = 0
    for name, V in after.items():
        W = before[name if name in before else "model.embed_tokens.weight"].float()
        expected = (W + weight * (V - W)).to(dtype)
        if torch.equal(V, W):  # none of V - W may be left over from rounding
            assert torch.equal(merged[name].float(), W), name
            continue
        changed += 1
        if is_low_rank(name, fields):
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(merged[name], expected, **close, msg=name)
        elif "trainable_token_indices" in fields:
            assert torch.equal(merged[name][[3, 7]], expected[[3, 7]])
            assert torch.equal(merged[name][8:], before[name][8:])
        else:
            assert torch.equal(merged[name], expected), name
    assert changed


@pytest.mark.parametrize("case", few(list(CASES), *USUAL))
def test_base_and_adapter_answer_as_the_merged_model_does(case: str, tmp_path: Path):
    make, fields = CASES[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    lorakit.merge(adapter, tmp_path / "merged", weights=[0.4], verify=False)
    opened, names = open_all(prepare(adapter, weights=[0.4]))
    assert names == ["default"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = output(opened.model, ids)
        with opened.model.disable_adapter():
            bare = output(opened.model, ids)
        merged = output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids)
        unchanged = output(AutoModelForCausalLM.from_pretrained(base), ids)
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-5)
    assert torch.equal(bare, unchanged)
    assert (found - bare).norm() > 1e-3


def test_adapters_of_several_kinds_are_added_up_with_their_weights(tmp_path: Path):
    torch.manual_seed(1)
    base = save_base(make_llama(), tmp_path / "base", torch.float32)
    kinds = [
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
        {**LINEAR, "trainable_token_indices": [3]},
        {**SMALL, "modules_to_save": ["norm"], "trainable_token_indices": [7]},
    ]
    folders = [save_adapter(base, tmp_path / str(i), kind) for i, kind in enumerate(kinds)]
    weights = [0.5, -0.25, 2]
    for name, options in {"one": {}, "two": {"in_memory": True}}.items():
        lorakit.merge(folders, tmp_path / name, weights=weights, verify=False, **options)
    same_bytes(tmp_path / "one", tmp_path / "two")
    before = tensors_in(base)
    expected = {key: tensor.clone() for key, tensor in before.items()}
    for i, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        lorakit.merge(folder, tmp_path / f"m{i}", verify=False)
        for key, tensor in tensors_in(tmp_path / f"m{i}").items():
            expected[key] += weight * (tensor - before[key])
    for key, tensor in tensors_in(tmp_path / "one").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_rows_of_a_batch_take_the_same_part_as_a_whole_batch():
    torch.manual_seed(1)
    model = wrap(make_llama().double().eval(), use_dora=True, target_modules=["q_proj"])
    model.add_adapter("plain", lorakit.LoraConfig(target_modules=["q_proj"]))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_share("default", 0.5)
    ids = torch.randint(0, 40, (2, 7))
    model.set_adapter("default")
    expected = output(model, ids)
    with torch.no_grad():
        rows = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(rows[0], expected[0])
    with model.disable_adapter():
        torch.testing.assert_close(rows[1], output(model, ids)[1])


def test_a_classifiers_head_has_no_part(tmp_path: Path):
    base = save_tiny_encoder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = lorakit.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"so it cannot be scaled: give it the weight 1, not 0.5"):
        lorakit.merge(tmp_path / "adapter", tmp_path / "merged", base=str(base), weights=[0.5])
