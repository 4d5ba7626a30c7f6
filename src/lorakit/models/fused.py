"""RMS norms and gated MLPs that keep less for the backward pass.

transformers writes them as several operations, and autograd keeps what each of them needs. Here
each is one function with the same operations forwards, so the same numbers to the bit, which is
tried on a module of every class before the class is taken; what can be computed again from what is
kept anyway is not kept (the idea of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorakit.models.loaded import in_evaluation

Forward = Callable[[torch.Tensor], torch.Tensor]


class RMSNorm(torch.autograd.Function):
    """`w * x / sqrt(mean(x²) + eps)` for a frozen `w`, computed in float32.

    Shapes: x (…, d), w (d,). Kept: x in its own dtype, and one number a position. With
    n = x / rms(x) and G = w dL/dy: dx = (G - n mean(G n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, w)
        return w * _scaled(wide, scale, own=x.dtype != wide.dtype).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, w = ctx.saved_tensors
        G = (grad * w).to(scale.dtype)
        n = _scaled(x.to(scale.dtype), scale, own=x.dtype != scale.dtype)
        dx = G.addcmul_(n, (G * n).mean(-1, keepdim=True), value=-1).mul_(scale)
        return dx.to(x.dtype), None, None


def _scaled(x: torch.Tensor, scale: torch.Tensor, own: bool) -> torch.Tensor:
    """x times scale, in the place of x where nobody else has it."""
    return x.mul_(scale) if own else x * scale


class SwiGLU(torch.autograd.Function):
    """`silu(g) * u`, which keeps `g` and `u` alone. Shapes: all the same.

    With G = dL/dy: du = G silu(g), dg = (G u) silu'(g).
    """

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * u, g), F.silu(g).mul_(grad)


Forwards = list[tuple[nn.Module, Forward]]
"""Modules, and what is called in the place of their own forward."""


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Within this block the modules of `model` that can are computed as above; gives their number.

    A class is taken where one of its modules gives the same to the bit; its trained weights, hooks
    and replaced forwards keep a module as it is.
    """
    forwards = fused_forwards(model)
    with in_use(forwards):
        yield len(forwards)


def fused_forwards(model: nn.Module) -> Forwards:
    """The modules of `model` that can be computed as above, for `in_use`."""
    taken: dict[type[nn.Module], bool] = {}
    found: Forwards = []
    for module in model.modules():
        made = _untouched(module) and (_norm(module) or _mlp(module))
        if not made:
            continue
        if type(module) not in taken:
            taken[type(module)] = _same(module, *made)
        if taken[type(module)]:
            found.append((module, made[0]))
    return found


@contextmanager
def in_use(forwards: Forwards) -> Iterator[None]:
    """Within this block the modules are computed by these."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            vars(module).pop("forward", None)


@contextmanager
def not_fused(model: nn.Module) -> Iterator[None]:
    """Within this block the modules of `model` have their own forwards, which keep nothing less
    where there is no backward pass, and which others may compute in their place.
    """
    taken = [
        (module, vars(module)["forward"])
        for module in model.modules()
        if getattr(vars(module).get("forward"), "__module__", None) == __name__
    ]
    for module, _ in taken:
        del module.forward
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward


def _norm(module: nn.Module) -> tuple[Forward, int] | None:
    """The fused forward of an RMS norm, and the width of its input."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    if (
        "RMSNorm" not in type(module).__name__
        or not isinstance(eps, float)
        or set(own) != {"weight"}
    ):
        return None
    weight = own["weight"]
    if weight.requires_grad:
        return None
    return (lambda x: RMSNorm.apply(x, weight, eps)), weight.shape[0]


def _mlp(module: Any) -> tuple[Forward, int] | None:
    """The fused forward of an MLP with a gate, and the width of its input."""
    if {name for name, _ in module.named_children()} != {
        "gate_proj",
        "up_proj",
        "down_proj",
        "act_fn",
    }:
        return None
    width = getattr(module.gate_proj, "in_features", None)
    if not isinstance(width, int) or not _untouched(module.act_fn):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))

    return forward, width


def _untouched(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return "forward" not in vars(module) and not hooks and takes_one


@torch.no_grad()
def _same(module: nn.Module, forward: Forward, width: int) -> bool:
    """Whether `forward` gives what `module` gives, to the bit."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    random = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(1, 3, width, generator=random, device=weight.device).to(dtype)
    try:
        with in_evaluation(module):
            return torch.equal(module(x), forward(x))
    except (RuntimeError, TypeError, ValueError):
        return False
