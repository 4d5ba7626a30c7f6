"""Adapters side by side in slots: the same product as each alone, whoever comes and goes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from families import make_gpt2, make_llama, make_tied
from lorakit.errors import InputError
from lorakit.lora.slots import AdapterSlots, Factors, same_inputs

IDS = torch.arange(12).view(4, 3)


def factors(model: nn.Module, seed: int, *ranks: int) -> Factors:
    """Random factors for every linear layer, of ranks that go round; 0 leaves a layer out."""
    generator = torch.Generator().manual_seed(seed)
    slots = AdapterSlots(model)
    found = {}
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for at, path in enumerate(p for p in linear if "lm_head" not in p):
        if r := ranks[at % len(ranks)]:
            d_out, d_in = _shape(slots.layer(path))
            A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
            B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
            found[path] = A, B
    return found


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.nf, layer.weight.shape[0]


def logits(model: Any) -> list[torch.Tensor]:
    """Of rows with several tokens, and with one, which are multiplied in different forms."""
    return [model(IDS).logits, model(IDS[:, :1]).logits]


def with_weights(model: Any, change: Factors) -> list[torch.Tensor]:
    """The logits with B A added to the weights themselves."""
    weights = {path: model.get_submodule(path).weight for path in change}
    before = {path: weight.data.clone() for path, weight in weights.items()}
    for path, (A, B) in change.items():
        turned = isinstance(model.get_submodule(path), Conv1D)
        weights[path].data += (B @ A).T if turned else B @ A
    try:
        return logits(model)
    finally:
        for path, weight in weights.items():
            weight.data = before[path]


@pytest.fixture(autouse=True)
def memory_that_nobody_filled_is_not_a_number() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[make_llama, make_gpt2, make_tied])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().double().eval()


@pytest.mark.parametrize("together", [False, True])
@torch.no_grad()
def test_each_row_gets_its_own_adapters_product(model: Any, together: bool):
    made = {"a": factors(model, 1, 3), "b": factors(model, 2, 1, 5, 0), "c": factors(model, 3, 2)}
    expected = {name: with_weights(model, change) for name, change in made.items()}
    expected[None] = logits(model)  # type: ignore[index]
    slots = AdapterSlots(model, same_inputs(model, lambda: model(IDS)) if together else ())

    def check(*names: str | None) -> None:
        slots.use(names)
        for form, found in enumerate(logits(model)):
            for row, name in enumerate(names):
                wanted = expected[name][form][row]  # type: ignore[index]
                assert torch.allclose(found[row], wanted, rtol=0, atol=1e-10)

    slots.put("b", made["b"])
    check("b", "b", None, "b")
    slots.put("a", made["a"])  # for layers too that b has nothing for
    check("a", "a", "a", "a")
    check("a", None, "b", None)
    slots.put("c", made["c"])
    check("a", "b", None, "c")
    check("a", "b", "b", "a")
    check("b", "b", "b", "b")
    check(None, None, None, None)
    slots.remove("b")  # a gap between two that stay
    check("c", "a", "c", None)
    slots.put("b2", made["c"])
    expected["b2"] = expected["c"]
    check("b2", "a", "c", "b2")
    slots.remove("a")
    slots.put("b", made["b"])  # wider than the gap
    check("b", "b2", None, "c")
    assert "a" not in slots


@torch.no_grad()
def test_a_weight_that_several_modules_share_stays_theirs(model: Any):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    slots = AdapterSlots(model)
    slots.put("a", factors(model, 1, 4))
    slots.use(["a", None, "a", "a"])
    model(IDS)
    names = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert names.keys() == before.keys()
    assert all(torch.equal(names[name], value) for name, value in before.items())


def test_what_does_not_fit_is_refused_before_anything_changes(model: Any):
    slots = AdapterSlots(model)
    path, (A, B) = next(iter(factors(model, 1, 2).items()))
    for bad, words in (
        ({path: (A[:, :-1], B)}, "adapter for another base model"),
        ({f"{path}.x": (A, B)}, "has no module"),
        ({path.rpartition(".")[0]: (A, B)}, "beside linear layers alone"),
    ):
        with pytest.raises(InputError, match=words):
            slots.require_fitting(bad)
    assert not slots.layers
