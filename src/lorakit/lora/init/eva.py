"""EVA: `A` along the main directions of each module's inputs, ranks where they explain most."""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.init.decompose import leading_directions
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
from lorakit.lora.init.random_factors import kaiming


@dataclass(frozen=True)
class EvaConfig:
    """The settings of EVA, with PEFT's names and defaults.

    Args:
        rho: a module gets at most `rho * r` of the ranks; 1 leaves every module its own.
        tau: a component has settled when the cosine to its last value is at least this.
        use_label_mask: leave out tokens whose label is `label_mask_value`.
        whiten: divide the components by the roots of their singular values.
        adjust_scaling_factors: the caller is to multiply alpha by new rank / old rank.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise InputError(f"eva_config: rho must be at least 1, not {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise InputError(f"eva_config: tau must be between 0 and 1, not {self.tau!r}")


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
    """`A` along the main directions of each module's inputs, with ranks distributed where they
    explain most (EVA, Paischer et al. 2024, arXiv:2410.07170). `B` starts at zero.

    Modules that are given one and the same tensor (query, key, value) share a decomposition.

    Args:
        modules: the linear modules to adapt, by name.
        batches: gone over until the components in use have settled (once, if an iterator). Of
            dictionaries, `attention_mask` and `labels` say which tokens count.
        run: runs the model on one batch.
        ranks: each module's rank before they are redistributed.
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
            for batch in itertools.chain(stream, again):
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


def _collect(data: DataPass) -> dict[str, torch.Tensor]:
    return eva(data.modules, data.batches, data.run, data.ranks, data.settings, model=data.model)


def _eva(site: InitSite) -> Factors:
    if site.data is None:  # until `initialize_lora_eva_weights`, as in PEFT
        return kaiming(site)
    return Factors(site.data, site.W.new_zeros(site.W.shape[0], len(site.data)))


register(
    Initialization(value="eva", make=_eva, settings=EvaConfig, field="eva_config", collect=_collect)
)
