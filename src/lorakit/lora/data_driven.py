"""First values of an adapter that come from data: the collectors of EVA, CorDA and LoRA-GA.

They look on while the model runs over a few batches, at the inputs of the modules to adapt or at
the gradients of their weights, and leave the model as it was. What CorDA and LoRA-GA make of it
is in `decomposition.py`; putting factors into layers is the caller's.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.decomposition import at_least_float32, leading_directions
from lorakit.lora.initial_settings import EvaConfig
from lorakit.lora.layers.linear import is_conv1d
from lorakit.lora.observing import (
    Modules,
    Run,
    alone_trained,
    as_rows,
    check_reached,
    counted_tokens,
    first_of,
    in_mode,
    leaders_of,
    linear_base,
    observed,
)


class IncrementalSVD:
    """The main directions of rows that arrive in batches (Ross et al. 2008, section 3.1).

    Holds `components` (k, d), orthonormal and most important first, `singular_values` (k,), and
    of all rows so far the number, the mean (d,) and the sum of squared distances to it.
    """

    def __init__(self, n_components: int) -> None:
        self.n_components = n_components
        self.count = 0
        self.components = self.singular_values = self.mean = self.cosines = torch.empty(0)
        self.scatter = torch.zeros((), dtype=torch.float64)
        self.dtype = torch.float32

    def update(self, rows: torch.Tensor) -> None:
        """Takes in rows (n, d), float32 or float64."""
        n, seen = len(rows), self.count
        if n == 0:
            return
        mean = rows.mean(dim=0, dtype=torch.float64)
        stacked = (rows - mean).to(rows.dtype)
        scatter = stacked.double().square().sum()
        if seen == 0:
            self.mean, self.scatter = mean, scatter
        else:
            # The means are float64, and with them all that comes after the first batch.
            shift = (seen * n / (seen + n)) ** 0.5 * (self.mean - mean)
            known = self.singular_values[:, None] * self.components
            stacked = torch.cat([known, stacked, shift[None]])
            self.mean = (seen * self.mean + n * mean) / (seen + n)
            self.scatter = self.scatter + scatter + shift.square().sum()
        self.singular_values, components = leading_directions(stacked, self.n_components)
        both = min(len(components), len(self.components))
        self.cosines = components.new_zeros(len(components))
        if both:
            self.cosines[:both] = (components[:both] * self.components[:both]).sum(dim=1)
        self.components, self.count, self.dtype = components, seen + n, rows.dtype

    @property
    def explained_variance_ratio(self) -> torch.Tensor:
        """The share of the scatter that lies along each component (k,)."""
        return self.singular_values.square() / self.scatter

    def settled(self, rank: int, tau: float) -> bool:
        """Whether the last update hardly turned the first `rank` components."""
        return self.count > 0 and bool((self.cosines[:rank] >= tau).all())


def redistribute_ranks(ratios: Mapping[str, torch.Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` best components, over all modules, are each module's.

    `ratios` is by module the share of variance that each component explains, largest first.
    """
    owners = [name for name, ratio in ratios.items() for _ in range(len(ratio))]
    shares = torch.cat([ratio.double().cpu() for ratio in ratios.values()])
    best = shares.argsort(descending=True, stable=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    return {name: counts[name] for name in ratios}


@torch.no_grad()
def eva(
    modules: Modules,
    batches: Iterable[Any],
    run: Run,
    ranks: Mapping[str, int],
    config: EvaConfig | None = None,
    *,
    model: nn.Module | None = None,
    max_passes: int = 20,
) -> dict[str, torch.Tensor]:
    """`A` along the main directions of each module's inputs, ranks dealt out where they explain
    most (EVA, Paischer et al. 2024, arXiv:2410.07170). `B` starts at zero.

    Modules that are given one and the same tensor (query, key, value) share a decomposition.

    Args:
        modules: the linear modules to adapt, by name.
        batches: gone over until the components in use have settled (once, if an iterator). Of
            dictionaries, `attention_mask` and `labels` say which tokens count.
        run: runs the model on one batch.
        ranks: each module's rank before they are dealt out anew.
        model: put into evaluation mode meanwhile; None leaves the mode to the caller.
        max_passes: over the batches, at most; a warning names what has not settled by then.

    Returns: by module `A` (new rank, d_in), float32 (float64 where the inputs are). The new rank
        may be 0: nothing is to be adapted there.
    Raises:
        InputError: there is no batch, a module is not linear, or got no input.
    """
    config = config or EvaConfig()
    first, stream = first_of(batches, "EVA")
    again = (batch for _ in range(max_passes - 1) for batch in batches)
    with in_mode(model, training=False):
        leaders = leaders_of(modules, run, first)
        svds = {leader: IncrementalSVD(0) for leader in leaders.values()}
        for name, leader in leaders.items():
            svd = svds[leader]
            svd.n_components = max(svd.n_components, round(ranks[name] * config.rho))
        new_ranks = {name: svds[leader].n_components for name, leader in leaders.items()}
        waiting, mask = set(svds), None

        def see(name: str, x: torch.Tensor) -> None:
            if name in waiting:
                svds[name].update(as_rows(x, mask))

        with observed({leader: modules[leader] for leader in svds}, see):
            for batch in itertools.chain([first], stream, again):
                mask = counted_tokens(
                    batch, config.label_mask_value if config.use_label_mask else None
                )
                run(batch)
                if all(svd.count for svd in svds.values()):
                    ratios = {n: svds[leaders[n]].explained_variance_ratio for n in modules}
                    new_ranks = redistribute_ranks(ratios, sum(ranks[name] for name in modules))
                needs = new_ranks.items()
                unsettled = (n for n, r in needs if not svds[leaders[n]].settled(r, config.tau))
                if not (waiting := {leaders[name] for name in unsettled}):
                    break
    check_reached(modules, {name for name in modules if svds[leaders[name]].count}, "EVA")
    if waiting:
        cure = "give more batches, or a smaller tau"
        warnings.warn(f"EVA has not settled for {listed(sorted(waiting))}: {cure}", stacklevel=3)
    for svd in svds.values() if config.whiten else ():
        svd.components = svd.components / svd.singular_values[:, None].sqrt()
    return {
        name: svds[leaders[name]].components[:rank].to(svds[leaders[name]].dtype, copy=True)
        for name, rank in new_ranks.items()
    }


@torch.no_grad()
def input_covariances(
    modules: Modules, batches: Iterable[Any], run: Run, *, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The mean of `X^T X` (d_in, d_in) over the calls of each module, X its input as rows.

    For `decomposition.corda`; the arguments are those of `eva`. As in PEFT, X is divided by its
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
            for batch in itertools.chain([first], stream):
                mask = counted_tokens(batch, ignored_label=None)
                run(batch)
    check_reached(modules, {name for name in modules if leaders[name] in sums}, "CorDA")
    means = {leader: total / calls[leader] for leader, total in sums.items()}
    return {name: means[leader] for name, leader in leaders.items()}


def weight_gradients(
    modules: Modules, batches: Iterable[Any], run: Run, *, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The mean over the batches of the loss's gradient for each weight (d_out, d_in), float32
    (float64 where the weight is). For `decomposition.lora_ga`. No `.grad` is touched.

    Args:
        run: runs the model on one batch, and returns the loss, a scalar, or calls its backward.
        model: put into training mode meanwhile, as in PEFT; None leaves the mode to the caller.
    Raises:
        InputError: there is no batch, a module is not linear, or its weight has no gradient.
    """
    first, stream = first_of(batches, "LoRA-GA")
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
        for batch in itertools.chain([first], stream):
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
