"""The fused linear layer is the plain formula, forward and backward, whatever it is given."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorakit.lora.kernels import lora_linear


def plain(x, W, b, A, B, scaling):
    return F.linear(x, W, b) + scaling * F.linear(F.linear(x, A), B)


def factors(d_in: int, d_out: int, r: int, dtype=torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    W, A, B = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((d_out, d_in), (r, d_in), (d_out, r))
    )
    return W, A.requires_grad_(), B.requires_grad_()


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    d_in=st.integers(1, 8),
    d_out=st.integers(1, 8),
    r=st.integers(1, 9),
    scaling=st.floats(0.1, 8),
    bias=st.booleans(),
    x_needs_grad=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_plain_formula(
    shape, d_in, d_out, r, scaling, bias, x_needs_grad
):
    W, A, B = factors(d_in, d_out, r)
    b = torch.randn(d_out, dtype=torch.float64) if bias else None
    x = torch.randn(*shape, d_in, dtype=torch.float64, requires_grad=x_needs_grad)
    inputs = (x, A, B) if x_needs_grad else (A, B)
    results = []
    for formula in (lora_linear, plain):
        y = formula(x, W, b, A, B, scaling)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_an_input_that_is_not_contiguous_is_understood():
    W, A, B = factors(6, 5, 3)
    x = torch.randn(4, 6, 2, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, None, A, B, 2.0), (x, A, B))


def test_in_bfloat16_gradients_are_close_to_the_exact_ones_and_have_their_factors_dtype():
    W, A, B = factors(64, 48, 8)
    x = torch.randn(32, 64, dtype=torch.float64)
    exact = torch.autograd.grad(plain(x, W, None, A, B, 0.5).square().mean(), (A, B))
    low = [t.detach().float().requires_grad_() for t in (A, B)]
    y = lora_linear(x.bfloat16(), W.bfloat16(), None, *low, 0.5)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().mean(), low)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_a_frozen_factor_gets_no_gradient_and_the_other_its_own():
    W, A, B = factors(6, 5, 3)
    A.requires_grad_(False)
    x = torch.randn(2, 6, dtype=torch.float64)
    lora_linear(x, W, None, A, B, 1.0).sum().backward()
    assert A.grad is None
    assert B.grad is not None


def test_a_second_derivative_is_refused_and_not_wrong():
    W, A, B = factors(6, 5, 3)
    x = torch.randn(2, 6, dtype=torch.float64)
    y = lora_linear(x, W, None, A, B, 1.0).square().sum()
    (gradient,) = torch.autograd.grad(y, A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("x_needs_grad", [True, False])
def test_what_dropout_hides_in_the_forward_pass_is_hidden_in_the_backward_pass(x_needs_grad: bool):
    W, A, B = factors(6, 5, 3)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=x_needs_grad)

    def fused(x, A, B):
        torch.manual_seed(4)  # the same mask in every call
        return lora_linear(x, W, None, A, B, 2.0, p=0.4)

    assert torch.autograd.gradcheck(fused, (x, A, B))
    torch.manual_seed(4)
    dropped = F.dropout(x, 0.4, training=True)
    expected = F.linear(x, W) + 2.0 * F.linear(F.linear(dropped, A), B)
    torch.testing.assert_close(fused(x, A, B), expected, rtol=1e-12, atol=1e-12)
