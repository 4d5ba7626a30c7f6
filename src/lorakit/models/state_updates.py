"""What Mamba, linear-attention and convolution layers do between their projections, for inference.

transformers has kernels for it and a reference in PyTorch, which is written to be read: it expands
scalars to whole states, copies each state several times a token, and pads every prompt to a chunk
of 64 to 256 tokens. Here are the same functions for where nothing is differentiated and no kernel
is installed: states are updated in place, a token at a time, and chunks are as long as they need to
be. Each has the name and the arguments of the one that it stands for, and hands over to it whatever
it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Reference = Callable[..., Any]

_CHUNK = 64
"""The most tokens of a chunk: work within chunks grows with their length, between them with 1."""


def take_over(model: nn.Module) -> Callable[[], None]:
    """Lets the mixers of `model` call the functions of this file; its training stays as it is.

    Returns: what takes it back.
    """
    made: dict[type[nn.Module], FunctionType | None] = {}
    taken: list[nn.Module] = []
    for module in model.modules():
        kind = type(module)
        if kind not in made:
            made[kind] = _with_own_functions(kind)
        forward = made[kind]
        if forward is None or "forward" in vars(module) or _is_hooked(module):
            continue
        module.forward = MethodType(forward, module)
        taken.append(module)

    def undo() -> None:
        for module in taken:
            vars(module).pop("forward", None)

    return undo


def _with_own_functions(kind: type[nn.Module]) -> FunctionType | None:
    """A class's forward that calls the functions of this file; None where it calls none of them."""
    forward: Any = inspect.unwrap(kind.forward)
    if not isinstance(forward, FunctionType):
        return None
    own = {
        name: _or_reference(quick, forward.__globals__[name])
        for name, (quick, package) in FUNCTIONS.items()
        if name in forward.__code__.co_names
        and name in forward.__globals__
        and find_spec(package) is None
    }
    if not own:
        return None
    code, names = forward.__code__, forward.__globals__ | own
    made = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _is_hooked(module: nn.Module) -> bool:
    """Whether accelerate moves the weights that these functions are given."""
    return any(hasattr(child, "_hf_hook") for child in module.children())


def _or_reference(quick: Reference, reference: Reference) -> Reference:
    def chosen(*given: Any, **named: Any) -> Any:
        lines = named.get("cu_seqlens") is not None or named.get("seq_idx") is not None
        if torch.is_grad_enabled() or lines:
            return reference(*given, **named)
        return quick(reference, *given, **named)

    return chosen


# --- convolutions ---------------------------------------------------------------------------


def causal_conv1d_update(
    reference: Reference,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The next output (rows, channels, 1) of causal convolutions, one a channel.

    Args:
        hidden_states: (rows, channels, 1).
        conv_state: the last inputs (rows, channels, kernel), changed in place.
        weight: (channels, kernel).
    """
    if hidden_states.shape[-1] > 1 or conv_state.shape[-1] != weight.shape[-1]:
        return reference(hidden_states, conv_state, weight, bias, activation)
    newest = torch.cat((conv_state[..., 1:], hidden_states), -1)
    conv_state.copy_(newest)
    out = (_wide(newest) * _wide(weight)).sum(-1, keepdim=True)
    return _activated(out, bias, activation).to(hidden_states.dtype)


def causal_conv1d_fn(
    _reference: Reference,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """Causal convolutions, one a channel: y_t = Σ_i w_i x_{t - kernel + 1 + i}.

    Shapes: hidden_states and the result (rows, channels, tokens), weight (channels, kernel).
    """
    tokens, kernel = hidden_states.shape[-1], weight.shape[-1]
    padded = F.pad(_wide(hidden_states), (kernel - 1, 0))
    w = _wide(weight)[..., None]
    out = padded[..., :tokens] * w[:, 0]
    for i in range(1, kernel):
        out.addcmul_(padded[..., i : i + tokens], w[:, i])
    return _activated(out, bias, activation).to(hidden_states.dtype)


def _activated(
    out: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    if bias is not None:
        out += _wide(bias)[:, None]
    if activation in ("silu", "swish"):
        return F.silu(out, inplace=True)
    if activation is None:
        return out
    from transformers.activations import ACT2FN

    return ACT2FN[activation](out)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- the delta rule -------------------------------------------------------------------------


def recurrent_delta_rule(
    reference: Reference,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One token of the gated delta rule (arXiv:2412.06464), or of Kimi's (arXiv:2510.26692).

    S ← D S + β k (v - kᵀ D S), o = qᵀ S / √d_k, with D = exp(g) a number a head, or one a channel.

    Args:
        query: (rows, 1, key heads, d_k), as `key`. Each key head serves as many value heads.
        value: (rows, 1, heads, d_v).
        g: (rows, 1, heads) or (rows, 1, heads, d_k).
        beta: (rows, 1, heads).
        initial_state: S (rows, heads, d_k, d_v), changed in place.

    Returns: o (rows, 1, heads, d_v), and S.
    """
    S = initial_state
    if S is None or S.dtype != torch.float32 or key.shape[1] > 1:
        return reference(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )
    heads, d_k = S.shape[1:3]
    both = torch.stack((key[:, 0], query[:, 0]), 2).float()  # (rows, key heads, 2, d_k)
    if use_qk_l2norm_in_kernel:
        both *= (both * both).sum(-1, keepdim=True).add_(1e-6).rsqrt_()
    both[:, :, 1] *= d_k**-0.5
    if both.shape[1] != heads:
        both = both.repeat_interleave(heads // both.shape[1], 1)
    k, q = both.unbind(2)
    decay = g[:, 0].float().exp()
    decay = decay[..., None] if decay.dim() == 2 else decay  # (rows, heads, 1 or d_k)
    # What either reads of the decayed state, so that it is gone through once.
    read = torch.matmul(both * decay[:, :, None], S)
    delta = (value[:, 0].float() - read[:, :, 0]).mul_(beta[:, 0, :, None].float())
    S.mul_(decay[..., None]).addcmul_(k[..., None], delta[:, :, None])
    out = torch.addcmul(read[:, :, 1], (q * k).sum(-1, keepdim=True), delta)
    return out[:, None].to(query.dtype), S if output_final_state else None


def chunk_delta_rule(
    reference: Reference, query: torch.Tensor, *given: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule of a whole prompt, in chunks as long as they need to be."""
    return reference(query, *given, **{"chunk_size": _chunk(query.shape[1], 32)} | named)


# --- Mamba 2 --------------------------------------------------------------------------------


def mamba2_selective_state_update(
    reference: Reference,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """One token of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060): S ← e^(dt A) S + dt x Bᵀ, y = S C.

    Args:
        state: S (rows, heads, d, n), changed in place.
        hidden_states: x (rows, heads, d).
        dt: (rows, heads, d), which is one number a head, expanded, as is A (heads, d, n).
        B: (rows, groups, n), as C; a group serves as many heads.

    Returns: y (rows, heads, d).
    """
    numbers = [dt.stride(-1), *A.stride()[-2:], 0 if dt_bias is None else dt_bias.stride(-1)]
    if any(numbers) or state.dtype != torch.float32 or hidden_states.dim() != 3:
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z}
        return reference(state, hidden_states, dt, A, B, C, **options)
    rows, heads, d, n = state.shape
    groups = B.shape[1]
    step = dt[..., 0]
    if dt_bias is not None:
        step = step + dt_bias[:, 0].to(step.dtype)
    step = (F.softplus(step) if dt_softplus else step).float()
    x = hidden_states.float()
    S = state.view(rows, groups, heads // groups, d, n)
    added = (x * step[..., None]).view(rows, groups, heads // groups, d, 1)
    decay = (step * A[:, 0, 0].float()).exp_()
    S.mul_(decay.view(rows, groups, -1, 1, 1)).addcmul_(added, B.float()[:, :, None, None])
    y = torch.matmul(S.flatten(2, 3), C.float()[..., None]).view(rows, heads, d)
    if D is not None:
        y = y.addcmul_(x, D.float())
    if z is not None:
        y = y.mul_(F.silu(z.float()))
    return y.to(hidden_states.dtype)


def mamba2_chunk_scan(
    _reference: Reference,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba 2 of a whole prompt, in chunks (the paper's section 6), in float32.

    Args:
        hidden_states: x (rows, tokens, heads, d).
        dt: (rows, tokens, heads).
        A: (heads,).
        B: (rows, tokens, groups, n), as C; a group serves as many heads.
        initial_states: S (rows, heads, d, n) before the first token.

    Returns: y (rows, tokens, heads, d), and, if asked for, S behind the last token.
    """
    rows, tokens, heads, d = hidden_states.shape
    groups, n = B.shape[2:]
    each = heads // groups
    if dt_bias is not None:
        dt = dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    length = min(chunk_size, _chunk(tokens))
    count = -(-tokens // length)

    def chunks(t: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, groups, e, k) → (rows, groups, chunks, e, length, k)."""
        padded = F.pad(t.float(), (0, 0, 0, 0, 0, 0, 0, count * length - tokens))
        return padded.unflatten(1, (count, length)).permute(0, 3, 1, 4, 2, 5)

    x = hidden_states.float()
    added = chunks((x * dt[..., None]).unflatten(2, (groups, each)))
    log_decay = chunks((dt * A.float()).view(rows, tokens, groups, each, 1))[..., 0]
    b, c = chunks(B[:, :, :, None]), chunks(C[:, :, :, None])
    # Sums over each stretch by itself: differences of sums lose the small ones.
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    between = log_decay[..., None].expand(*log_decay.shape, length)
    between = between.masked_fill(~lower, 0).cumsum(-2)
    between = between.masked_fill_(lower.T, float("-inf")).exp_()
    since = log_decay.cumsum(-1)
    y = torch.matmul((c @ b.mT) * between, added)
    # What each chunk adds to the state, decayed to its end: (rows, groups, chunks, e, d, n).
    left = (added * between[..., -1, :, None]).mT @ b
    whole = since[..., -1, None, None].exp()
    since = since.exp_()[..., None]
    S = None if initial_states is None else initial_states.float().unflatten(1, (groups, each))
    for i in range(count):
        if S is not None:
            y[:, :, i] += (c[:, :, i] @ S.mT) * since[:, :, i]
        S = left[:, :, i] if S is None else S * whole[:, :, i] + left[:, :, i]
    y = y.permute(0, 2, 4, 1, 3, 5).reshape(rows, count * length, heads, d)[:, :tokens]
    if D is not None:
        y = y + D.float()[:, None] * x
    y = y.contiguous()  # as callers view it
    if not return_final_states:
        return y
    assert S is not None
    return y, S.reshape(rows, heads, d, n)


def _chunk(tokens: int, most: int = _CHUNK) -> int:
    """How long chunks are that share these tokens evenly, with as little padding as can be."""
    return -(-tokens // max(1, -(-tokens // most)))


FUNCTIONS: dict[str, tuple[Reference, str]] = {
    "causal_conv1d_update": (causal_conv1d_update, "causal_conv1d"),
    "causal_conv1d_fn": (causal_conv1d_fn, "causal_conv1d"),
    "torch_recurrent_gated_delta_rule": (recurrent_delta_rule, "fla"),
    "recurrent_kimi_delta_attention": (recurrent_delta_rule, "fla"),
    "torch_chunk_gated_delta_rule": (chunk_delta_rule, "fla"),
    "chunk_kimi_delta_attention": (chunk_delta_rule, "fla"),
    "mamba2_selective_state_update": (mamba2_selective_state_update, "mamba_ssm"),
    "mamba2_chunk_scan": (mamba2_chunk_scan, "mamba_ssm"),
}
"""By transformers' name, with the package whose kernel it would take instead."""
