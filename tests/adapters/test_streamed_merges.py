"""A merge file by file has the bytes of one in memory, and is PEFT's, for every kind of layer."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

import lorakit
from families import (
    Attention,
    Convolutions,
    make_gpt2,
    make_gpt_oss,
    make_llama,
    make_mixtral,
    make_t5,
    make_tied,
    wrap,
)
from lorakit.adapters.plan import finish_plan, start_plan
from lorakit.adapters.streaming import write_merged
from lorakit.models.shards import WEIGHTS_NAME, ShardReader, read_shards
from lorakit.models.skeleton import FileNames
from matrix import few
from tiny import byte_tokenizer

LINEAR: dict[str, Any] = {"target_modules": "all-linear", "r": 4}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
SMALL = {"target_modules": ["v_proj"], "r": 2}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (make_llama, LINEAR),
    "rsLoRA": (make_llama, {**LINEAR, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (make_llama, {**LINEAR, **PATTERNS}),
    "DoRA": (make_llama, {**LINEAR, "use_dora": True}),
    "lora_bias": (make_llama, {**LINEAR, "lora_bias": True}),
    "bias of adapted layers": (make_llama, {**LINEAR, "bias": "lora_only"}),
    "all biases": (make_llama, {**SMALL, "bias": "all"}),
    "all biases and lora_bias": (make_llama, {**SMALL, "bias": "all", "lora_bias": True}),
    "saved module": (make_llama, {**SMALL, "modules_to_save": ["o_proj", "lm_head"]}),
    "embedding": (make_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, DoRA": (make_llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (make_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tokens": (make_llama, {**SMALL, "trainable_token_indices": [3, 7]}),
    "PiSSA": (make_llama, {**LINEAR, "init_lora_weights": "pissa"}),
    "Conv1D": (make_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D, DoRA": (make_gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
    "position embedding": (make_gpt2, {"target_modules": ["wpe", "c_attn"]}),
    "tied, apart": (make_tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": (make_tied, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, both": (make_tied, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied tokens": (make_tied, {**SMALL, "trainable_token_indices": [3, 7]}),
    "tied, saved": (make_tied, {**SMALL, "modules_to_save": ["lm_head"]}),
    "experts (in, out)": (make_gpt_oss, {**SMALL, "target_parameters": ["mlp.experts.down_proj"]}),
    "two parameters": (
        make_gpt_oss,
        {**SMALL, "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    "beside experts": (make_mixtral, {"target_modules": ["q_proj", "v_proj"]}),
    "encoder and decoder": (make_t5, {"target_modules": ["q", "v", "wo"]}),
}
USUAL = (
    *("DoRA", "patterns", "all biases and lora_bias", "saved module"),
    *("Conv1D", "tied tokens", "two parameters"),
)
"""Of each kind of layer and of file one that every change merges."""

LOADED = {
    "experts (out, in)": (make_mixtral, {**SMALL, "target_parameters": ["experts.down_proj"]})
}


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype, shard: str = "8KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, fields: dict[str, Any], seed: int = 3) -> Path:
    """An adapter on the model in `base`, all of whose tensors are random."""
    kind = AutoModelForSeq2SeqLM if is_t5(base) else AutoModelForCausalLM
    task = "SEQ_2_SEQ_LM" if is_t5(base) else "CAUSAL_LM"
    model = kind.from_pretrained(base, dtype=torch.float32)
    random = {} if "init_lora_weights" in fields else {"init_lora_weights": False}
    ours = wrap(model, seed, task_type=task, **{**random, **fields})
    with torch.no_grad():
        for tensor in ours.adapter_tensors("default").values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    ours.save_pretrained(folder)
    return folder


def is_t5(base: Path) -> bool:
    return '"t5"' in (base / "config.json").read_text()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(one: Path, two: Path) -> None:
    a, b = tensors_in(one), tensors_in(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", few(list(CASES), *USUAL))
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], torch.bfloat16))
def test_every_kind_of_layer_is_merged_to_the_same_bytes_as_in_memory(
    case: str, dtype: torch.dtype, tmp_path: Path
):
    make, fields = CASES[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    before = {path: path.read_bytes() for path in base.iterdir()}
    streamed = lorakit.merge(adapter, tmp_path / "streamed", verify=False)
    loaded = lorakit.merge(adapter, tmp_path / "loaded", verify=False, in_memory=True)
    assert streamed.streamed, streamed.notices
    assert not loaded.streamed
    same_bytes(tmp_path / "streamed", tmp_path / "loaded")
    assert streamed.modules == loaded.modules
    assert streamed.survived == pytest.approx(loaded.survived, rel=1e-3)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


# PEFT adds to the one weight that both have: its merged head changes unasked, or twice.
APART = {"tied, apart", "tied, head", "tied, both"}


@pytest.mark.parametrize(
    "case",
    few([c for c in [*CASES, *LOADED] if c not in APART], *(c for c in USUAL if c not in APART)),
)
def test_in_float32_every_merge_is_pefts(case: str, tmp_path: Path):
    make, fields = (CASES | LOADED)[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    report = lorakit.merge(adapter, tmp_path / "merged", verify=False)
    assert report.streamed is (case in CASES)
    kind = AutoModelForSeq2SeqLM if is_t5(base) else AutoModelForCausalLM
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
    state = theirs.merge_and_unload().state_dict()
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == state.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("make", "targets", "dora"),
    [
        (Convolutions, ["one", "two", "three", "look_up"], False),
        (Convolutions, ["one", "two", "three", "look_up"], True),
        (Attention, ["attention", "head"], False),
    ],
)
def test_convolutions_and_attention_are_merged_to_the_same_bytes_as_in_memory(
    make: Callable[[], nn.Module], targets: list[str], dora: bool, tmp_path: Path
):
    torch.manual_seed(1)
    model = make()
    save_file(model.state_dict(), tmp_path / WEIGHTS_NAME)
    fields = {"target_modules": targets, "r": 2, "use_dora": dora}
    wrap(copy.deepcopy(model), **fields).save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    loaded = lorakit.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    with torch.device("meta"):
        bare = make()
    own = dict(bare.state_dict(keep_vars=True))
    names = FileNames({key: key for key in own}, frozenset(), frozenset())
    adapted = lorakit.PeftModel.from_pretrained(bare, tmp_path / "adapter")
    shards = read_shards(tmp_path)
    plan = start_plan(adapted.get_base_model(), own, shards, names, {"default": 1.0})
    finish_plan(plan, own, shards, names, [], None)
    (tmp_path / "out").mkdir()
    with ShardReader([tmp_path / WEIGHTS_NAME]) as reader:
        write_merged(tmp_path / "out", plan, reader)
    streamed = tensors_in(tmp_path / "out")
    expected = theirs.merge_and_unload().state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(streamed[key], tensor), key
        if not key.endswith("out_proj.weight"):  # into which PEFT merges twice
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_several_adapters_are_merged_with_their_weights(tmp_path: Path):
    torch.manual_seed(1)
    base = save_base(make_llama(), tmp_path / "base", torch.float32)
    other = {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_rslora": True}
    folders = [
        save_adapter(base, tmp_path / "a", LINEAR),
        save_adapter(base, tmp_path / "b", other),
    ]
    weights = [0.75, -0.5]
    for name, options in {"one": {}, "two": {"in_memory": True}}.items():
        lorakit.merge(folders, tmp_path / name, weights=weights, verify=False, **options)
    same_bytes(tmp_path / "one", tmp_path / "two")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    expected = {key: tensor.clone() for key, tensor in before.items()}
    for i, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        lorakit.merge(folder, tmp_path / str(i), verify=False)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).state_dict()
        for key, tensor in alone.items():
            expected[key] += weight * (tensor - before[key])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_float64_stays_float64(tmp_path: Path):
    base = save_base(make_llama(), tmp_path / "base", torch.float64)
    adapter = save_adapter(base, tmp_path / "adapter", LINEAR)
    lorakit.merge(adapter, tmp_path / "merged", verify=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    merged = tensors_in(tmp_path / "merged")
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-12, atol=1e-14, msg=key)


def test_files_keep_their_names_and_layout_and_what_is_not_adapted_its_bytes(tmp_path: Path):
    torch.manual_seed(1)
    base = save_base(make_llama(), tmp_path / "base", torch.bfloat16, "4KB")
    adapter = save_adapter(base, tmp_path / "adapter", SMALL)
    lorakit.merge(adapter, tmp_path / "merged", verify=False)
    before, after = read_shards(base), read_shards(tmp_path / "merged")
    assert len(before) > 2
    assert {f: sorted(t) for f, t in before.items()} == {f: sorted(t) for f, t in after.items()}
    old, new = tensors_in(base), tensors_in(tmp_path / "merged")
    assert {key for key in old if not torch.equal(old[key], new[key])} == {
        f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_a_file_without_the_bodys_prefix_is_merged_under_its_own_names(tmp_path: Path):
    """As the first GPT-2's files: `h.0.attn…` for the model's `transformer.h.0.attn…`."""
    torch.manual_seed(1)
    base = save_base(make_gpt2(), tmp_path / "base", torch.float32, "5GB")
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": ["c_attn"]})
    lorakit.merge(adapter, tmp_path / "with", verify=False)
    old = load_file(base / WEIGHTS_NAME)
    short = {key.removeprefix("transformer."): tensor for key, tensor in old.items()}
    save_file(short, base / WEIGHTS_NAME, metadata={"format": "pt"})
    report = lorakit.merge(adapter, tmp_path / "without", verify=False)
    assert report.streamed
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("with", "without")
    )
    assert tensors_in(tmp_path / "without").keys() == short.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_experts_that_files_hold_in_parts_are_merged_in_memory_with_a_notice(tmp_path: Path):
    make, fields = LOADED["experts (out, in)"]
    base = save_base(make(), tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    report = lorakit.merge(adapter, tmp_path / "merged", verify=False)
    assert not report.streamed
    assert "merged in memory: the base's files do not hold" in report.notices[0]
    assert "experts.down_proj as the model has it" in report.notices[0]


def test_where_embedding_and_head_come_to_differ_they_are_untied(tmp_path: Path):
    torch.manual_seed(1)
    base = save_base(make_tied(), tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": ["embed_tokens"]})
    report = lorakit.merge(adapter, tmp_path / "merged", verify=False)
    assert "tie_word_embeddings is false" in report.notices[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    old = AutoModelForCausalLM.from_pretrained(base)
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, old.lm_head.weight)
    assert not torch.equal(merged.model.embed_tokens.weight, old.model.embed_tokens.weight)


def test_of_an_update_of_a_hundredth_of_the_weight_bfloat16_keeps_about_83_percent(tmp_path: Path):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=40,
    )  # fmt: skip
    base = save_base(LlamaForCausalLM(config), tmp_path / "base", torch.bfloat16, "5GB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ours = wrap(model, target_modules=["up_proj"], r=64, lora_alpha=64)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        norm = layer.base_weight.norm() / layer.get_delta_weight("default").norm()
        layer.lora_B["default"].weight.mul_(norm * 0.01)
    ours.save_pretrained(tmp_path / "adapter")
    half = lorakit.merge(tmp_path / "adapter", tmp_path / "half", verify=False)
    assert half.survived == pytest.approx(0.83, abs=0.03)
    assert half.survived_by_module == {"model.layers.0.mlp.up_proj": half.survived}
    whole = lorakit.merge(tmp_path / "adapter", tmp_path / "f32", verify=False, dtype="float32")
    assert whole.survived == 1
