"""What a matrix gives an adapter to start from: PEFT 0.21's values, and the best there are."""

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.init.corda import corda
from lorakit.lora.init.decompose import leading_directions
from lorakit.lora.init.from_weight import olora, orthogonal, pissa
from lorakit.lora.init.loftq import int8_rows, loftq, normal_float, normal_float_levels
from lorakit.lora.init.lora_ga import lora_ga

# The sixteen levels of NF4 that QLoRA publishes (arXiv:2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SHAPES = [(24, 16), (16, 24)]
R, SCALING = 4, 1.5

shapes = st.tuples(st.integers(2, 20), st.integers(2, 20))
near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}
nearly: dict[str, float] = {"rtol": 0, "atol": 1e-10}


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def peft_layer(W: torch.Tensor, **attributes: Any) -> Any:
    """PEFT's layer around the weight `W`; `attributes` are what its preparation leaves there."""
    base = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    base[0].weight.data = W.clone()
    config = peft.LoraConfig(r=R, lora_alpha=R * SCALING, target_modules=["0"])
    layer = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    for name, value in attributes.items():
        setattr(layer.get_base_layer(), name, value)
    torch.manual_seed(5)
    return layer


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def best_of_rank(W: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


# --- PiSSA, OLoRA, orthogonal ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("niter", [None, 0, 1, 7])
def test_pissas_factors_are_pefts(niter: int | None, shape: tuple[int, int], dtype: torch.dtype):
    W = matrix(*shape, dtype=dtype)
    layer = peft_layer(W)
    layer.pissa_init("default", "pissa" if niter is None else f"pissa_niter_{niter}")
    torch.manual_seed(5)
    A, B = pissa(W, R, SCALING, niter)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close((A, B), factors(layer), **near)
    rest = (W.float() - SCALING * B @ A).to(dtype)
    torch.testing.assert_close(rest, layer.get_base_layer().weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_oloras_factors_are_pefts(shape: tuple[int, int], dtype: torch.dtype):
    W = matrix(*shape, dtype=dtype)
    layer = peft_layer(W)
    layer.olora_init("default")
    A, B = olora(W, R)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close((A, B), factors(layer), **near)
    rest = (W.float() - SCALING * B @ A).to(dtype)
    torch.testing.assert_close(rest, layer.get_base_layer().weight.detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_factors_are_pefts_on_the_same_seed(shape: tuple[int, int]):
    layer = peft_layer(matrix(*shape, dtype=torch.float32))
    layer.orthogonal_init("default")
    torch.manual_seed(5)
    A, B = orthogonal(shape[1], shape[0], R)
    assert torch.equal(A, factors(layer)[0])
    assert torch.equal(B, factors(layer)[1])


@given(shape=shapes, share=st.floats(0, 1), scaling=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_what_pissa_makes_is_the_best_approximation(shape, share, scaling, seed):
    W = matrix(*shape, seed=seed)
    r = 1 + round(share * (min(shape) - 1))
    for niter in (None, 30):
        A, B = pissa(W, r, scaling, niter)
        assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
        assert A.dtype == B.dtype == torch.float64
        lost = torch.linalg.matrix_norm(W - scaling * B @ A)
        least = torch.linalg.matrix_norm(W - best_of_rank(W, r))
        assert lost <= least * (1 + (1e-10 if niter is None else 0.05)) + 1e-10
        # Both factors have an even share.
        torch.testing.assert_close(A.norm(), B.norm(), **nearly)


@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_olora_makes_is_a_projection_of_the_weight(shape, share, seed):
    W = matrix(*shape, seed=seed)
    r = 1 + round(share * (min(shape) - 1))
    A, B = olora(W, r)
    torch.testing.assert_close(B.T @ B, torch.eye(r, dtype=W.dtype), **nearly)
    torch.testing.assert_close(A, B.T @ W, **nearly)


@given(shape=shapes, half=st.integers(1, 6), seed=st.integers(0, 99))
def test_orthogonal_factors_are_not_zero_and_their_product_is(shape, half, seed):
    torch.manual_seed(seed)
    A, B = orthogonal(*shape, 2 * half)
    assert (A.shape, B.shape) == ((2 * half, shape[0]), (shape[1], 2 * half))
    assert A.abs().max() > 1e-4
    assert B.abs().max() > 1e-4
    assert (B @ A).abs().max() < 1e-5


def test_the_weight_stays_as_it_is():
    W = matrix(8, 6)
    before = W.clone()
    pissa(W, 2, 1.0)
    olora(W, 2)
    loftq(W, 2, 4, 2)
    corda(W, torch.eye(6), 2, 1.0)
    lora_ga(W, W, 2, 1.0)
    assert torch.equal(W, before)


# --- LoftQ ----------------------------------------------------------------------------------


def test_four_bits_have_the_levels_that_qlora_published():
    assert torch.equal(normal_float_levels(4), torch.tensor(NF4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_ascend_from_minus_one_to_one_and_have_a_zero(bits: int):
    levels = normal_float_levels(bits)
    assert levels.shape == (2**bits,)
    assert (levels.diff() > 0).all()
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1, 0, 1)


@given(shape=shapes, bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
def test_every_value_goes_to_the_nearest_level_of_its_block(shape, bits, seed):
    W = matrix(*shape, seed=seed)
    blocks = zip(W.flatten().split(64), normal_float(W, bits).flatten().split(64), strict=True)
    for block, quantized in blocks:
        allowed = normal_float_levels(bits).double() * block.abs().max()
        distances = (block[:, None] - allowed).abs().amin(dim=1)
        torch.testing.assert_close((block - quantized).abs(), distances, **nearly)
        torch.testing.assert_close(normal_float(quantized, bits), quantized, **nearly)


@given(shape=shapes, seed=st.integers(0, 99))
def test_eight_bits_are_whole_steps_of_each_rows_largest_value(shape, seed):
    W = matrix(*shape, seed=seed).half().double()
    quantized = int8_rows(W)
    step = W.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(quantized / step, (quantized / step).round(), **nearly)
    assert ((quantized - W).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("quantize", [lambda W: normal_float(W, 4), int8_rows])
def test_zeros_stay_zeros(quantize: Any):
    W = matrix(3, 64)
    W[1] = 0
    assert torch.equal(quantize(W)[1], W[1])


@pytest.mark.parametrize("shape", [(64, 64), (33, 65)])
def test_quantised_values_are_those_of_bitsandbytes(shape: tuple[int, int]):
    bnb = pytest.importorskip("bitsandbytes")
    W = matrix(*shape, dtype=torch.float32)
    with torch.compiler.set_stance("force_eager"):  # which it would compile for this shape
        packed, state = bnb.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
        theirs = bnb.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(normal_float(W, 4), theirs, rtol=0, atol=1e-6)
    rows = bnb.nn.Int8Params(W.clone(), requires_grad=False).to("cpu")
    theirs = bnb.functional.int8_vectorwise_dequant(rows.data, rows.SCB)
    torch.testing.assert_close(int8_rows(W), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftqs_factors_make_up_best_for_the_quantisation(bits: int):
    W = matrix(24, 32)
    quantized, A, B = loftq(W, R, bits, 1)
    expected = int8_rows(W) if bits == 8 else normal_float(W, bits)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=0)
    torch.testing.assert_close(B @ A, best_of_rank(W - quantized, R), **nearly)


@pytest.mark.parametrize("bits", [2, 4])
def test_more_iterations_of_loftq_come_closer_to_the_weight(bits: int):
    W = matrix(24, 32)
    errors = []
    for iterations in (1, 5):
        quantized, A, B = loftq(W, 8, bits, iterations)
        errors.append(torch.linalg.matrix_norm(W - quantized - B @ A))
    plain = torch.linalg.matrix_norm(W - normal_float(W, bits))
    assert errors[1] < errors[0] < plain


def test_loftq_takes_the_scaling_into_account_when_it_is_told():
    W = matrix(24, 32)
    quantized, A, B = loftq(W, R, 4, 3)
    same, scaled_A, scaled_B = loftq(W, R, 4, 3, scaling=SCALING)
    assert torch.equal(quantized, same)
    torch.testing.assert_close(SCALING * scaled_B @ scaled_A, B @ A, **nearly)


# --- CorDA and LoRA-GA ----------------------------------------------------------------------


@given(shape=shapes, share=st.floats(0, 1), scaling=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_cordas_two_modes_are_the_two_ends_of_one_decomposition(shape, share, scaling, seed):
    W, X = matrix(*shape, seed=seed), matrix(3 * shape[1], shape[1], seed=seed + 100)
    C, most = X.T @ X, min(shape)
    r = 1 + round(share * (most - 1))
    A, B = corda(W, C, r, scaling)
    assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
    made = scaling * B @ A
    if r < most:
        A, B = corda(W, C, most - r, scaling, "kpm")
        made = made + scaling * B @ A
    torch.testing.assert_close(made, W, rtol=0, atol=1e-7)


def test_corda_without_a_preferred_direction_is_pissa():
    W = matrix(12, 9)
    A, B = corda(W, 3 * torch.eye(9), R, SCALING)
    torch.testing.assert_close(SCALING * B @ A, best_of_rank(W, R), **nearly)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_gas_factors_are_pefts(direction: Any, scale: Any, shape: tuple[int, int]):
    W, G = (matrix(*shape, seed=seed, dtype=torch.float32) for seed in (0, 1))
    config = peft.LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    layer = peft_layer(W, _peft_loraga_grad=G)
    layer.lora_ga_init("default", config)
    torch.manual_seed(5)
    A, B = lora_ga(G, W, R, SCALING, direction, scale, stable_gamma=9)
    torch.testing.assert_close((A, B), factors(layer), **near)
    rest = W - SCALING * B @ A
    torch.testing.assert_close(rest, layer.get_base_layer().weight.detach(), rtol=0, atol=1e-5)


def test_lora_gas_default_sends_the_first_directions_to_a_and_the_next_to_b():
    G = matrix(20, 18)
    U, S, Vh = torch.linalg.svd(G)
    A, B = lora_ga(G, G, R, SCALING, scale="unit")
    torch.testing.assert_close((A @ Vh[:R].T).abs(), torch.eye(R, dtype=G.dtype), **nearly)
    expected = torch.diag(S[R : 2 * R])
    torch.testing.assert_close((U[:, R : 2 * R].T @ B).abs(), expected, **nearly)


# --- directions of rows ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
def test_leading_directions_are_those_of_the_whole_decomposition(shape: tuple[int, int]):
    left, _ = torch.linalg.qr(matrix(shape[0], 30))
    right, _ = torch.linalg.qr(matrix(shape[1], 30, seed=1))
    X = left * 0.7 ** torch.arange(30) @ right.T
    S, Vh = leading_directions(X, 4)
    torch.testing.assert_close(S, 0.7 ** torch.arange(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close((Vh @ right[:, :4]).abs(), torch.eye(4).double(), rtol=0, atol=1e-3)
    state = torch.get_rng_state()
    assert torch.equal(leading_directions(X, 4)[1], Vh)
    assert torch.equal(torch.get_rng_state(), state)


@given(shape=shapes, k=st.integers(1, 12), rank=st.integers(0, 4), seed=st.integers(0, 99))
def test_directions_in_which_there_is_nothing_are_left_out(shape, k, rank, seed):
    X = matrix(shape[0], rank, seed=seed) @ matrix(rank, shape[1], seed=seed + 100)
    S, Vh = leading_directions(X, k)
    found = min(k, rank, *shape)
    assert (S.shape, Vh.shape) == ((found,), (found, shape[1]))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(found, dtype=X.dtype), **nearly)


# --- what cannot be done --------------------------------------------------------------------

W = matrix(8, 6)
NO_NUMBER = torch.full((8, 6), float("nan"))
ERRORS: dict[str, tuple[str, Any]] = {
    "a rank above the weight's": ("r=7 .*8 x 6.*r=6 or less", lambda: pissa(W, 7, 1.0)),
    "a rank above it, fast": ("r=7 .*r=6 or less", lambda: pissa(W, 7, 1.0, niter=2)),
    "a rank above it, olora": ("OLoRA: r=7", lambda: olora(W, 7)),
    "a rank above it, loftq": ("LoftQ: r=7", lambda: loftq(W, 7, 4, 1)),
    "no rank": ("r must be at least 1", lambda: olora(W, 0)),
    "an odd rank": ("even rank, not r=3", lambda: orthogonal(6, 8, 3)),
    "no rank, orthogonal": ("r must be at least 1", lambda: orthogonal(6, 8, 0)),
    "whole numbers": ("floating numbers, not .*int8", lambda: pissa(W.to(torch.int8), 2, 1.0)),
    "a vector": (r"not \(6,\)", lambda: pissa(W[0], 1, 1.0)),
    "no numbers": ("NaN or Inf", lambda: pissa(NO_NUMBER, 2, 1.0)),
    "bits": ("loftq_bits must be 2, 4 or 8, not 3", lambda: loftq(W, 2, 3, 1)),
    "iterations": ("loftq_iter must be at least 1", lambda: loftq(W, 2, 4, 0)),
    "corda's method": ("ipm or kpm", lambda: corda(W, torch.eye(6), 2, 1.0, "ipn")),  # type: ignore[arg-type]
    "a covariance of zero": ("zero, NaN or Inf", lambda: corda(W, torch.zeros(6, 6), 2, 1.0)),
    "a direction": ("direction must be", lambda: lora_ga(W, W, 2, 1.0, "ArBr2")),  # type: ignore[arg-type]
    "a scale": ("scale must be", lambda: lora_ga(W, W, 2, 1.0, scale="big")),  # type: ignore[arg-type]
    "gamma": ("stable_gamma must be", lambda: lora_ga(W, W, 2, 1.0, stable_gamma=0)),
    "too many directions": ("r=3 or less", lambda: lora_ga(W, W, 4, 1.0)),
    "a gradient without numbers": ("NaN or Inf", lambda: lora_ga(NO_NUMBER, W, 2, 1.0)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_decomposed_is_an_error_of_one_line(case: str):
    message, attempt = ERRORS[case]
    with pytest.raises(InputError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
