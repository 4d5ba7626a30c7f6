"""The batched product of adapters side by side, which a GPU takes, and the one span by span."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.lora.spans import (
    LoraBatchedSpansFunction,
    LoraSpansFunction,
    Span,
    can_be_batched,
)

D_IN, D_OUT = 7, 5
LENGTHS, RANKS, SCALINGS = (3, 6, 1, 4), (2, 5, 1, 2), (2.0, 0.7, 1.0, 11.3)


def spans(lengths: tuple[int, ...] = LENGTHS) -> list[Span]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        Span(end - size, end, scaling)
        for end, size, scaling in zip(ends, lengths, SCALINGS, strict=False)
    ]


def tensors(
    ranks: tuple[int, ...] = RANKS, lengths: tuple[int, ...] = LENGTHS
) -> list[torch.Tensor]:
    """x (1, positions, d_in), W, b, and the factors of each span, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), D_IN), (D_OUT, D_IN), (D_OUT,)]
    shapes += [shape for r in ranks for shape in ((r, D_IN), (D_OUT, r))]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def outcome(
    function: Any, given: list[torch.Tensor], lengths: tuple[int, ...] = LENGTHS
) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the factors."""
    x, W, b, *factors = (tensor.clone() for tensor in given)
    learned = [x.requires_grad_(), *(factor.requires_grad_() for factor in factors)]
    y = function.apply(x, W, b, spans(lengths), *factors)
    y.square().sum().backward()
    return [y.detach(), *(tensor.grad for tensor in learned)]


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 3, 3, 3)])
@pytest.mark.parametrize("ranks", [RANKS, (3, 3, 3, 3)])
def test_both_forms_give_the_same_numbers(ranks: tuple[int, ...], lengths: tuple[int, ...]):
    given = tensors(ranks, lengths)
    forms = LoraBatchedSpansFunction, LoraSpansFunction
    both = zip(*(outcome(form, given, lengths) for form in forms), strict=True)
    for batched, one_by_one in both:
        torch.testing.assert_close(batched, one_by_one, rtol=1e-12, atol=1e-12)


def test_the_gradients_are_those_of_its_output():
    x, W, b, *factors = (tensor.requires_grad_() for tensor in tensors())
    fixed = W.detach(), b.detach(), spans()
    assert torch.autograd.gradcheck(
        lambda x, *f: LoraBatchedSpansFunction.apply(x, *fixed, *f), (x, *factors)
    )


def test_an_adapter_that_is_no_number_harms_no_other():
    given = tensors()
    expected = outcome(LoraBatchedSpansFunction, given)
    given[3 + 2] = torch.full_like(given[3 + 2], float("nan"))  # A of the second
    y, dx, *gradients = outcome(LoraBatchedSpansFunction, given)
    others = [slice(0, 3), slice(9, 14)]
    for part in others:
        assert torch.equal(y[:, part], expected[0][:, part])
        assert torch.equal(dx[:, part], expected[1][:, part])
    for i, gradient in enumerate(gradients):
        if i // 2 != 1:
            assert torch.equal(gradient, expected[2 + i])
    assert y[:, 3:9].isnan().all()


def test_a_weight_that_is_unpacked_is_not_kept():
    given = tensors()
    calls = []

    def unpack() -> torch.Tensor:
        calls.append(1)
        return given[1]

    x, _, b, *factors = given
    y = LoraBatchedSpansFunction.apply(x.requires_grad_(), unpack, b, spans(), *factors)
    y.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "possible"),
    [
        (lambda s: s, True),
        (lambda s: s[:1], False),  # one adapter alone needs no stack
        (lambda s: s[1:], False),
        (lambda s: s[:-1], False),
        (lambda s: [s[0], Span(4, s[1].end, 1.0), *s[2:]], False),
        (lambda s: [*s[:-1], Span(s[-1].begin, s[-1].end, 1.0, p=0.1)], False),
        (lambda s: [*s[:-1], Span(s[-1].begin, s[-1].end, 1.0, rows=(2, 1))], False),
        (lambda s: [*s[:-1], *s[-1:], *s[-1:]], False),  # two adapters on the same positions
    ],
)
def test_which_spans_can_be_batched(change: Callable[[list[Span]], list[Span]], possible: bool):
    assert can_be_batched(change(spans()), sum(LENGTHS)) is possible
