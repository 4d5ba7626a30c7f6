"""A configuration says what it was given, as PEFT writes it, and refuses what it cannot mean."""

import json
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import LoraConfig
from lorakit.errors import InputError


def refusal(**fields: Any) -> str:
    with pytest.raises(InputError) as error:
        LoraConfig(**fields)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": -3}, "not -3"),
        ({"r": 2.5}, "not 2.5"),
        ({"r": True}, "not True"),
        ({"rank_pattern": {"q_proj": 0}}, "r must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in [0, 1)"),
        ({"bias": "some"}, "bias must be none, all or lora_only"),
        ({"init_lora_weights": "piza"}, "'piza' is not supported"),
        ({"init_lora_weights": "pissa_niter_x"}, "'pissa_niter_x' is not supported"),
        ({"target_modules": []}, "use 'all-linear'"),
        ({"target_modules": [1]}, "target_modules must be a list of names or a text"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be indices"),
        ({"layers_pattern": "("}, "'(' is not a regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is not a regular expression"),
        ({"alpha_pattern": {"*": 3}}, "alpha_pattern: '*' is not a regular expression"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=True is for use_dora=False"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True is for"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ({"target_parameters": ["w"], "lora_dropout": 0.1}, "set lora_dropout=0"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], words: str):
    assert words in refusal(**fields)


def test_what_peft_keeps_as_sets_and_nulls_is_understood():
    config = LoraConfig(
        target_modules={"v_proj", "q_proj"},  # type: ignore[arg-type]
        layers_to_transform=(1, 0),  # type: ignore[arg-type]
        rank_pattern=None,  # type: ignore[arg-type]
    )
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.layers_to_transform == [0, 1]
    assert config.rank_pattern == {}


@pytest.mark.parametrize(
    ("pattern", "rank"), [("q_proj", 2), (r"layers\.1\.attn\.q_proj", 2), ("proj", 8), ("attn", 8)]
)
def test_patterns_match_ends_of_paths_at_a_dot(pattern: str, rank: int):
    config = LoraConfig(rank_pattern={pattern: 2}, alpha_pattern={pattern: 2})
    assert config.rank_for("model.layers.1.attn.q_proj") == rank
    assert config.alpha_for("model.layers.1.attn.q_proj") == rank
    assert config.rank_for("model.layers.1.attn.xq_proj") == 8


@given(
    r=st.integers(1, 512),
    alpha=st.one_of(st.integers(1, 512), st.floats(0.1, 512)),
    dropout=st.floats(0, 0.99),
    targets=st.lists(st.sampled_from(["q_proj", "k_proj", "é", "0"]), min_size=1, unique=True),
    layers=st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1)),
    rslora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
)
def test_json_and_back_is_the_same_configuration(r, alpha, dropout, targets, layers, rslora, bias):
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=rslora,
        bias=bias,
        rank_pattern={"k_proj": r},
    )
    assert LoraConfig.from_dict(json.loads(config.to_json())) == config


def test_no_field_of_pefts_file_is_lost():
    theirs = peft.LoraConfig(r=5, target_modules=["q_proj"], layers_to_transform=[1]).to_dict()
    theirs = json.loads(json.dumps(theirs, default=lambda value: sorted(value)))
    theirs["a_field_of_tomorrow"] = None
    ours = LoraConfig.from_dict(theirs).to_dict()
    assert {name: ours[name] for name in theirs} == theirs
    assert peft.LoraConfig(**{k: v for k, v in ours.items() if k != "a_field_of_tomorrow"}).r == 5


@pytest.mark.parametrize(
    ("read", "meant"),
    [
        ({"r": 16.0}, {"r": 16}),
        ({"r": "16", "lora_alpha": "32"}, {"r": 16, "lora_alpha": 32}),
        ({"lora_alpha": "0.5", "lora_dropout": "0.05"}, {"lora_alpha": 0.5, "lora_dropout": 0.05}),
        ({"rank_pattern": {"q_proj": 4.0}}, {"rank_pattern": {"q_proj": 4}}),
        ({"alpha_pattern": {"q_proj": "8"}}, {"alpha_pattern": {"q_proj": 8}}),
        ({"layers_to_transform": [1.0, "2"]}, {"layers_to_transform": [1, 2]}),
        ({"target_modules": "['v_proj', 'q_proj']"}, {"target_modules": ["v_proj", "q_proj"]}),
        ({"target_modules": "{'v_proj', 'q_proj'}"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"target_modules": r"[vq]_proj"}, {"target_modules": r"[vq]_proj"}),
        (
            {"peft_type": "PeftType.LORA", "task_type": "TaskType.CAUSAL_LM"},
            {"task_type": "CAUSAL_LM"},
        ),
        ({"use_rslora": "false", "use_dora": "True"}, {"use_rslora": False, "use_dora": True}),
        ({"use_rslora": None, "bias": None, "lora_dropout": None, "init_lora_weights": None}, {}),
        ({"init_lora_weights": "true", "alpha_pattern": None, "loftq_config": None}, {}),
    ],
)
def test_a_files_values_are_read_as_what_they_can_mean_only(
    read: dict[str, Any], meant: dict[str, Any]
):
    assert LoraConfig.from_dict(read) == LoraConfig(**meant)


@pytest.mark.parametrize(
    "read",
    [
        *({"r": r} for r in (None, 16.5, "sixteen", "-1", [16], True, float("inf"))),
        *({"lora_alpha": alpha} for alpha in (None, "nan", "", [8], True)),
        *({"use_rslora": "maybe"}, {"use_dora": 2}, {"target_modules": "[1, 2]", "r": 0}),
    ],
)
def test_a_files_values_that_can_mean_several_things_are_refused(read: dict[str, Any]):
    with pytest.raises(InputError, match="here: "):
        LoraConfig.from_dict(read, where="here")


def test_fields_of_ms_swift_are_read_and_kept_unless_they_change_the_model():
    inert = {"lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06, "lora_dtype": "fp32"}
    inert |= {"merge_weights": True, "swift_type": "LORA", "use_merged_linear": False}
    inert |= {"use_qa_lora": False, "enable_lora": None, "model_key_mapping": None}
    config = LoraConfig.from_dict({"r": 16.0, **inert})
    assert config.r == 16
    assert {name: config.to_dict()[name] for name in inert} == inert
    for active in (
        {"use_merged_linear": True},
        {"enable_lora": [True, False, True]},
        {"use_qa_lora": True},
        {"model_key_mapping": {"a": "b"}},
        {"swift_type": "ADAPTER"},
    ):
        with pytest.raises(InputError, match=f"{next(iter(active))}=.* is not supported"):
            LoraConfig.from_dict(active)


def test_an_unknown_field_is_refused_when_it_is_active_and_passes_when_it_is_not():
    for inert in (None, False, {}, [], ""):
        assert LoraConfig.from_dict({"r": 4, "new_method": inert}).other_fields == {
            "new_method": inert
        }
    with pytest.raises(InputError, match=r"here: new_method=True is not supported"):
        LoraConfig.from_dict({"new_method": True}, where="here")
    with pytest.raises(InputError, match="did you mean 'lora_alpha'"):
        LoraConfig.from_dict({"lora_alfa": 16})


@pytest.mark.parametrize(
    "values", [{"peft_type": "IA3"}, {"rank_pattern": [1]}, {"r": None}, {"target_modules": {}}]
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_name(values: dict[str, Any]):
    with pytest.raises(InputError, match=r"^a\.json: ") as error:
        LoraConfig.from_dict(values, where="a.json")
    assert "\n" not in str(error.value)
