"""Adapters of stacked experts are combined and resized expert by expert, in PEFT's files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_gpt_oss, make_mixtral
from lorakit.adapters.combine import combine
from lorakit.adapters.resize import resize
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_config
from random_adapters import change, make_adapter
from tiny import byte_tokenizer

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.fixture(params=[make_mixtral, make_gpt_oss], ids=["(out, in)", "(in, out)"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def two(base: Path, **fields: Any) -> tuple[Path, Path]:
    """One of all experts and of attention, and one of half the experts' parameters."""
    one = make_adapter(
        base,
        base.parent / "one",
        target_modules=["q_proj"],
        target_parameters=[UP, DOWN],
        rank_pattern={DOWN: 2},
        lora_alpha=6,
        **fields,
    )
    other = make_adapter(
        base,
        base.parent / "other",
        seed=1,
        r=3,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=[DOWN],
        **fields,
    )
    return one, other


def test_the_sum_is_that_of_every_expert_in_peft_too(base: Path):
    adapters = two(base)
    report = combine(adapters, base.parent / "sum", weights=[0.7, -1.3])
    assert report.lost == 0
    config = read_config(base.parent / "sum")
    assert set(config.target_parameters or []) == {UP, DOWN}
    assert config.rank_for(f"model.layers.1.{DOWN}") == 5
    changes = [change(base, adapter) for adapter in adapters]
    found = change(base, base.parent / "sum")
    for name, delta in found.items():
        expected = 0.7 * changes[0][name] - 1.3 * changes[1][name]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_other_methods_and_smaller_ranks_are_best_for_each_expert_by_itself(base: Path):
    one, _ = two(base)
    delta = change(base, one)
    stacks = [name for name in delta if "experts" in name and delta[name].any()]
    assert len(stacks) == 4
    resize(one, base.parent / "small", rank=1)
    combine([one], base.parent / "svd", weights=[2.0], method="svd", rank=1)
    for folder, factor in (("small", 1.0), ("svd", 2.0)):
        found = change(base, base.parent / folder)
        for name in stacks:
            U, S, Vh = torch.linalg.svd(delta[name])
            best = U[:, :, :1] * S[:, None, :1] @ Vh[:, :1]
            torch.testing.assert_close(found[name], factor * best, rtol=1e-3, atol=1e-5)
    ties = combine(two(base), base.parent / "ties", weights=[1, 1], method="ties", density=0.5)
    assert 0 < ties.lost < 1


def test_a_layer_and_its_weight_as_a_parameter_are_not_combined(tmp_path: Path, tiny_model: Path):
    layer = make_adapter(tiny_model, tmp_path / "layer", target_modules=["q_proj"])
    weight = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    parameter = make_adapter(tiny_model, tmp_path / "parameter", **weight)
    with pytest.raises(InputError, match="no one adapter can hold both"):
        combine([layer, parameter], tmp_path / "sum", weights=[1, 1])
    combine([parameter], tmp_path / "half", weights=[0.5])
    whole, half = change(tiny_model, parameter), change(tiny_model, tmp_path / "half")
    for name in whole:
        torch.testing.assert_close(half[name], 0.5 * whole[name], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "sum").exists()


def test_an_adapter_of_parameters_without_a_known_base_is_named(tmp_path: Path, tiny_model: Path):
    weight = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    parameter = make_adapter(tiny_model, tmp_path / "parameter", **weight)
    file = parameter / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"{tiny_model}"', "null"))
    with pytest.raises(InputError, match="which the base model names"):
        resize(parameter, tmp_path / "small", rank=1)
