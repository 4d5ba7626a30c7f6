"""CorDA: a part of the weight as the covariance of its inputs shows it."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.init.decompose import checked
from lorakit.lora.init.initialization import DataPass, Factors, Initialization, InitSite, register
from lorakit.lora.init.observing import (
    Modules,
    Run,
    as_rows,
    check_reached,
    counted_tokens,
    first_of,
    in_mode,
    leaders_of,
    observed,
)


@dataclass(frozen=True)
class CordaConfig:
    """The settings of CorDA, with PEFT's names and defaults.

    Args:
        cache_file: the finished factors are read from here, or written to it (safetensors).
        covariance_file: the same for the covariances of the inputs.
        corda_method: `ipm` or `kpm`, see `corda`.
        verbose, use_float16_for_covariance, prune_temporary_fields: accepted as in PEFT; nothing
            is printed, sums are in float32 and nothing temporary is left on the model.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@torch.no_grad()
def corda(
    W: torch.Tensor,
    covariance: torch.Tensor,
    r: int,
    scaling: float,
    method: Literal["ipm", "kpm"] = "ipm",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of the weight as the data sees it (CorDA, Yang et al. 2024, arXiv:2406.05223).

    With `W C = U S V^T`, `scaling * B A = U_r S_r V_r^T C^-1`: of the r largest singular values
    for `ipm` (the instruction-previewed mode, the fastest to learn the data's task), of the r
    smallest for `kpm` (the knowledge-preserved mode, which leaves alone what the data shows).

    Shapes: W (d_out, d_in), covariance C (d_in, d_in). Returns: A (r, d_in), B (d_out, r), in
        float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, `W` or C hold NaN or Inf, C is zero.
    """
    if method not in ("ipm", "kpm"):
        raise InputError(f"corda_method must be ipm or kpm, not {method!r}")
    W = checked(W, r, "CorDA")
    C = covariance.to(W)
    level = C.diagonal().mean()
    if not C.isfinite().all() or level <= 0:
        raise InputError("CorDA: the covariance of a module's inputs is zero, NaN or Inf")
    one = torch.eye(len(C), dtype=C.dtype, device=C.device)
    for doublings in itertools.count():
        damped = C + 0.01 * 2**doublings * level * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            break
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    part = slice(r) if method == "ipm" else slice(len(S) - r, len(S))
    root = (S[part] / scaling).sqrt()
    return root[:, None] * (Vh[part] @ inverse), U[:, part] * root


@torch.no_grad()
def input_covariances(
    modules: Modules, batches: Iterable[Any], run: Run, *, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The mean of `X^T X` (d_in, d_in) over the calls of each module, X its input as rows.

    For `corda`; the arguments are those of `eva`. As in PEFT, X is divided by its
    largest value first. Modules that are given one and the same tensor get one covariance.

    Raises:
        InputError: there is no batch, a module is not linear, or got no input.
    """
    first, stream = first_of(batches, "CorDA")
    sums: dict[str, torch.Tensor] = {}
    calls: Counter[str] = Counter()
    mask = None

    def see(name: str, x: torch.Tensor) -> None:
        rows = as_rows(x, mask)
        if len(rows):
            largest = rows.max().abs()
            rows = rows / torch.where(largest > 0, largest, 1)
            sums[name] = sums.get(name, 0) + rows.T @ rows
            calls[name] += 1

    with in_mode(model, training=False):
        leaders = leaders_of(modules, run, first)
        with observed({leader: modules[leader] for leader in leaders.values()}, see):
            for batch in stream:
                mask = counted_tokens(batch, ignored_label=None)
                run(batch)
    check_reached(modules, {name for name in modules if leaders[name] in sums}, "CorDA")
    means = {leader: total / calls[leader] for leader, total in sums.items()}
    return {name: means[leader] for name, leader in leaders.items()}


def _collect(data: DataPass) -> dict[str, torch.Tensor]:
    return input_covariances(data.modules, data.batches, data.run, model=data.model)


def _corda(site: InitSite) -> Factors:
    if site.data is None:
        raise InputError("init_lora_weights='corda' needs data: call preprocess_corda first")
    method = site.settings.corda_method
    return Factors(*corda(site.W, site.data, site.r, site.scaling, method))


register(
    Initialization(
        value="corda",
        make=_corda,
        settings=CordaConfig,
        field="corda_config",
        collect=_collect,
        subtracted=True,
    )
)
