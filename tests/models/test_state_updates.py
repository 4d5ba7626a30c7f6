"""What mixers compute is what transformers' references do, and an engine alone uses it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon_h1 import modeling_falcon_h1 as mamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from layer_kinds import tiny_config
from lorakit.engine.carried import Carried, how_carried
from lorakit.models import state_updates
from matrix import few

ROWS, HEADS, K, V = 3, 6, 8, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def own(name: str) -> Callable[..., Any]:
    """Our function of transformers' name; it must not fall back to the reference."""
    return lambda *given, **named: state_updates.FUNCTIONS[name][0](None, *given, **named)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_convolutions_of_a_prompt_and_of_a_token(bias: bool, activation: str | None):
    weight, b = torch.randn(20, 4), torch.randn(20) if bias else None
    x, token = torch.randn(ROWS, 20, 17), torch.randn(ROWS, 20, 1)
    expected = qwen.causal_conv1d_fn(x, weight, b, activation)
    same(own("causal_conv1d_fn")(x, weight, b, activation), expected)
    states = torch.randn(2, ROWS, 20, 4)
    states[1] = states[0]
    expected = qwen.causal_conv1d_update(token, states[0], weight, b, activation)
    same(own("causal_conv1d_update")(token, states[1], weight, b, activation), expected)
    same(states[1], states[0])


@pytest.mark.parametrize("module", [qwen, kimi], ids=["a number a head", "a number a channel"])
@pytest.mark.parametrize("tokens", [1, 37, 70])
def test_the_delta_rule_of_a_prompt_and_of_a_token(module: Any, tokens: int):
    gated = module is qwen
    keys = 2 if gated else HEADS
    query, key = torch.randn(2, ROWS, tokens, keys, K)
    value = torch.randn(ROWS, tokens, HEADS, V)
    given = {
        "g": -torch.rand(ROWS, tokens, HEADS, *(() if gated else (K,))) * 3,
        "beta": torch.rand(ROWS, tokens, HEADS),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    S = torch.randn(ROWS, HEADS, K, V)
    names = ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
    if not gated:
        names = ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"]
    name = names[tokens == 1]
    reference = getattr(module, name)
    quick = state_updates.FUNCTIONS[name][0]
    expected = reference(query, key, value, initial_state=S.clone(), **given)
    state = S.clone()
    found = quick(reference, query, key, value, initial_state=state, **given)
    same(found, expected, 1e-4)
    assert (found[1] is state) == (tokens == 1)  # in place


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("tokens", "before"), [(1, True), (37, False), (37, True), (150, True)])
def test_mamba_2_of_a_prompt(groups: int, tokens: int, before: bool):
    x, dt = torch.randn(ROWS, tokens, HEADS, K), torch.randn(ROWS, tokens, HEADS)
    B, C = torch.randn(2, ROWS, tokens, groups, V)
    given = {
        "A": -torch.rand(HEADS) * 16,
        "B": B,
        "C": C,
        "chunk_size": 32,
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
        "initial_states": torch.randn(ROWS, HEADS, K, V) if before else None,
        "dt_softplus": True,
        "dt_limit": (0.001, 1.5),
        "return_final_states": True,
    }
    same(own("mamba2_chunk_scan")(x, dt, **given), mamba.mamba2_chunk_scan(x, dt, **given), 1e-4)


@pytest.mark.parametrize("gate", [True, False])
def test_mamba_2_of_a_token(gate: bool):
    def each(t: torch.Tensor, *more: int) -> torch.Tensor:
        return t.reshape(*t.shape, *(1 for _ in more)).expand(*t.shape, *more)

    x = torch.randn(ROWS, HEADS, K)
    given = {
        "dt": each(torch.randn(ROWS, HEADS), K),
        "A": each(-torch.rand(HEADS) * 16, K, V),
        "B": torch.randn(ROWS, 2, V),
        "C": torch.randn(ROWS, 2, V),
        "D": each(torch.randn(HEADS), K),
        "dt_bias": each(torch.randn(HEADS), K),
        "dt_softplus": True,
        "z": torch.randn(ROWS, HEADS, K) if gate else None,
    }
    theirs = torch.randn(ROWS, HEADS, K, V)
    ours = theirs.clone()
    expected = mamba.mamba2_selective_state_update(theirs, x, **given)
    same(own("mamba2_selective_state_update")(ours, x, **given), expected)
    same(ours, theirs)


def calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our functions that a forward of `model` calls."""
    called: list[str] = []
    for name, (quick, package) in state_updates.FUNCTIONS.items():

        def noted(*given: Any, _name: str = name, _quick: Any = quick, **named: Any) -> Any:
            called.append(_name)
            return _quick(*given, **named)

        monkeypatch.setitem(state_updates.FUNCTIONS, name, (noted, package))
    return called


FAMILIES = {
    "qwen3_next": 4,
    "kimi_linear": 4,
    "falcon_h1": 4,
    "granitemoehybrid": 4,
    "mamba2": 4,
    "zamba2": 4,
    "lfm2": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", few(FAMILIES.keys(), "qwen3_next", "falcon_h1"))
def test_an_engine_uses_them(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype).eval()
    called = calls(model, monkeypatch)
    assert how_carried(model) == Carried()
    assert len(set(called)) == FAMILIES[family]
    assert any("forward" in vars(module) for module in model.modules())


def test_training_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next")).eval()
    called = calls(model, monkeypatch)
    assert how_carried(model) == Carried()
    called.clear()
    with torch.enable_grad():
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert not called


def test_functions_that_give_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch):
    name = "torch_recurrent_gated_delta_rule"
    quick, package = state_updates.FUNCTIONS[name]

    def wrong(*given: Any, **named: Any) -> Any:
        out, S = quick(*given, **named)
        return 2 * out, S

    monkeypatch.setitem(state_updates.FUNCTIONS, name, (wrong, package))
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next")).eval()
    assert how_carried(model) == Carried()
    assert not any("forward" in vars(module) for module in model.modules())
