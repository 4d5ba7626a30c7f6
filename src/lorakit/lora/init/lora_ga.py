"""LoRA-GA: directions of the gradient of the weight."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.architecture import is_conv1d
from lorakit.lora.init.decompose import at_least_float32, checked
from lorakit.lora.init.initialization import DataPass, Factors, Initialization, InitSite, register
from lorakit.lora.init.observing import (
    Modules,
    Run,
    alone_trained,
    check_reached,
    first_of,
    in_mode,
    linear_base,
)

Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit"]


@dataclass(frozen=True)
class LoraGAConfig:
    """The settings of LoRA-GA, with PEFT's names and defaults; see `lora_ga`."""

    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    stable_gamma: int = 16


@torch.no_grad()
def lora_ga(
    gradient: torch.Tensor,
    W: torch.Tensor,
    r: int,
    scaling: float,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of the weight's gradient, so that the first step of the adapter is close to the
    first step of full training (LoRA-GA, Wang et al. 2024, arXiv:2407.05000).

    Of the gradient's first 2r singular triples, `A` gets right vectors and `B` left vectors times
    their singular values. Draws from PyTorch's generator, in PEFT's order.

    Shapes: gradient and W (d_out, d_in). Returns: A (r, d_in), B (d_out, r), in float32 (float64
        where the gradient is).
    Args:
        direction: which of the triples go where: `ArB2r` the first r to `A` and the others to
            `B`, `A2rBr` the other way round, `ArBr` in turn (the first to `B`), `random` the same
            r of them, drawn, to both.
        scale: `stable` multiplies `B` by `d_out^(1/4) / sqrt(stable_gamma)`, `weight_svd` brings
            its largest singular value to that of `W`, `gd_scale` divides both by `scaling`.
    Raises:
        InputError: an unknown name, 2r is more than the gradient has, or it holds NaN or Inf.
    """
    for name, value, kind in (("direction", direction, Direction), ("scale", scale, Scale)):
        if value not in get_args(kind):
            known = listed(get_args(kind))
            raise InputError(f"lora_ga {name} must be one of {known}, not {value!r}")
    if not stable_gamma > 0:
        raise InputError(f"lora_ga stable_gamma must be above 0, not {stable_gamma!r}")
    if 2 * r > min(gradient.shape):
        raise InputError(
            f"LoRA-GA takes 2r directions of a gradient, and one of {gradient.shape[0]} x "
            f"{gradient.shape[1]} has fewer than {2 * r}: use r={min(gradient.shape) // 2} or less"
        )
    G = checked(gradient, r, "LoRA-GA")
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    for_A, for_B = _triples(direction, r)
    A, B = V.T[for_A], U[:, for_B] * S[for_B]
    if scale == "stable":
        B = B * (len(G) ** 0.25 / stable_gamma**0.5)
    elif scale == "weight_svd":
        _, weight_S, _ = torch.svd_lowrank(W.to(G.dtype), q=r, niter=4)
        largest = S[for_B][0]
        B = B * (weight_S[0] / largest) if largest > 0 else B
    elif scale == "gd_scale":
        A, B = A / scaling, B / scaling
    return A.contiguous(), B.contiguous()


def _triples(direction: Direction, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of 2r singular triples are for `A` and which for `B`, r of them each."""
    if direction == "random":
        drawn = torch.randperm(2 * r)[:r]
        return drawn, drawn
    order = torch.arange(2 * r)
    return {
        "ArBr": (order[1::2], order[0::2]),
        "A2rBr": (order[r:], order[:r]),
        "ArB2r": (order[:r], order[r:]),
    }[direction]


def weight_gradients(
    modules: Modules, batches: Iterable[Any], run: Run, *, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The mean over the batches of the loss's gradient for each weight (d_out, d_in), float32
    (float64 where the weight is). For `lora_ga`. No `.grad` is touched.

    Args:
        run: runs the model on one batch, and returns the loss, a scalar, or calls its backward.
        model: put into training mode meanwhile, as in PEFT; None leaves the mode to the caller.
    Raises:
        InputError: there is no batch, a module is not linear, or its weight has no gradient.
    """
    _, stream = first_of(batches, "LoRA-GA")
    weights = {name: linear_base(name, module).weight for name, module in modules.items()}
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point:
            raise InputError(f"LoRA-GA: {name} is quantised, and its weight has no gradient")
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def add(name: str, gradient: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + at_least_float32(gradient)
        counts[name] += 1

    others = () if model is None else model.parameters()
    with in_mode(model, training=True), torch.enable_grad(), alone_trained(weights, others, add):
        for batch in stream:
            before = counts.total()
            loss = run(batch)
            if counts.total() > before:  # run has called backward
                continue
            if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.grad_fn):
                raise InputError(
                    "LoRA-GA: run must call backward, or return the loss, which weights determine"
                )
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    add(name, gradient)
    check_reached(modules, set(sums), "LoRA-GA")
    means = {name: sums[name] / counts[name] for name in modules}
    return {n: G.T if is_conv1d(linear_base(n, modules[n])) else G for n, G in means.items()}


def _collect(data: DataPass) -> dict[str, torch.Tensor]:
    return weight_gradients(data.modules, data.batches, data.run, model=data.model)


def _lora_ga(site: InitSite) -> Factors:
    if site.data is None:
        raise InputError("init_lora_weights='lora_ga' needs data: call preprocess_loraga first")
    settings = dataclasses.asdict(site.settings)
    return Factors(*lora_ga(site.data, site.W, site.r, site.scaling, **settings))


register(
    Initialization(
        value="lora_ga",
        make=_lora_ga,
        settings=LoraGAConfig,
        field="lora_ga_config",
        collect=_collect,
        subtracted=True,
    )
)
