"""First values of an adapter that come from data: the collectors of EVA, CorDA and LoRA-GA.

They look on while the model runs over a few batches, at the inputs of the modules to adapt or at
the gradients of their weights, and leave the model as it was. What CorDA and LoRA-GA make of it
is in `decomposition.py`; putting factors into layers is the caller's.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.decomposition import at_least_float32, leading_directions
from lorakit.lora.layers.linear import is_conv1d

Modules = Mapping[str, nn.Module]
Run = Callable[[Any], Any]


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
    first, stream = _first_of(batches, "EVA")
    again = (batch for _ in range(max_passes - 1) for batch in batches)
    with _in_mode(model, training=False):
        leaders = _leaders(modules, run, first)
        svds = {leader: IncrementalSVD(0) for leader in leaders.values()}
        for name, leader in leaders.items():
            svd = svds[leader]
            svd.n_components = max(svd.n_components, round(ranks[name] * config.rho))
        new_ranks = {name: svds[leader].n_components for name, leader in leaders.items()}
        waiting, mask = set(svds), None

        def see(name: str, x: torch.Tensor) -> None:
            if name in waiting:
                svds[name].update(_rows(x, mask))

        with _observed({leader: modules[leader] for leader in svds}, see):
            for batch in itertools.chain([first], stream, again):
                mask = _mask(batch, config.label_mask_value if config.use_label_mask else None)
                run(batch)
                if all(svd.count for svd in svds.values()):
                    ratios = {n: svds[leaders[n]].explained_variance_ratio for n in modules}
                    new_ranks = redistribute_ranks(ratios, sum(ranks[name] for name in modules))
                needs = new_ranks.items()
                unsettled = (n for n, r in needs if not svds[leaders[n]].settled(r, config.tau))
                if not (waiting := {leaders[name] for name in unsettled}):
                    break
    _check_reached(modules, {name for name in modules if svds[leaders[name]].count}, "EVA")
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
    first, stream = _first_of(batches, "CorDA")
    sums: dict[str, torch.Tensor] = {}
    calls: Counter[str] = Counter()
    mask = None

    def see(name: str, x: torch.Tensor) -> None:
        rows = _rows(x, mask)
        if len(rows):
            largest = rows.max().abs()
            rows = rows / torch.where(largest > 0, largest, 1)
            sums[name] = sums.get(name, 0) + rows.T @ rows
            calls[name] += 1

    with _in_mode(model, training=False):
        leaders = _leaders(modules, run, first)
        with _observed({leader: modules[leader] for leader in leaders.values()}, see):
            for batch in itertools.chain([first], stream):
                mask = _mask(batch, ignored_label=None)
                run(batch)
    _check_reached(modules, {name for name in modules if leaders[name] in sums}, "CorDA")
    means = {leader: total / calls[leader] for leader, total in sums.items()}
    return {name: means[leader] for name, leader in leaders.items()}


def weight_gradients(
    modules: Modules, batches: Iterable[Any], run: Run, *, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The mean over the batches of the loss's gradient for each weight (d_out, d_in), float32
    (float64 where the weight is). For `decomposition.lora_ga`. No `.grad` is touched.

    Args:
        run: runs the model on one batch and returns the loss, a scalar.
        model: put into training mode meanwhile, as in PEFT; None leaves the mode to the caller.
    Raises:
        InputError: there is no batch, a module is not linear, or its weight has no gradient.
    """
    first, stream = _first_of(batches, "LoRA-GA")
    weights = {name: _linear(name, module).weight for name, module in modules.items()}
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point:
            raise InputError(f"LoRA-GA: {name} is quantised, and its weight has no gradient")
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with _in_mode(model, training=True), torch.enable_grad():
            for batch in itertools.chain([first], stream):
                loss = run(batch)
                if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.grad_fn):
                    raise InputError("LoRA-GA: run must return the loss, which weights determine")
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name] = sums.get(name, 0) + at_least_float32(gradient)
                        counts[name] += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
    _check_reached(modules, set(sums), "LoRA-GA")
    means = {name: sums[name] / counts[name] for name in modules}
    return {n: G.T if is_conv1d(_linear(n, modules[n])) else G for n, G in means.items()}


@contextmanager
def _observed(modules: Modules, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(name, x)` with the input x (…, d_in) of every one of `modules` that runs."""

    def look(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, args[0] if args else next(iter(kwargs.values())))

    handles = []
    try:
        for name, module in modules.items():
            hook = partial(look, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_mode(model: nn.Module | None, *, training: bool) -> Iterator[None]:
    """`model` in training or evaluation mode, every module in its own again afterwards."""
    before = {} if model is None else {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, was in before.items():
            module.training = was


def _leaders(modules: Modules, run: Run, batch: Any) -> dict[str, str]:
    """For each module the first that is given the same tensor as it is, in a run of `batch`."""
    leaders = {name: name for name in modules if _linear(name, modules[name])}
    calls: Counter[str] = Counter()
    last: tuple[torch.Tensor, int, str] | None = None

    def see(name: str, x: torch.Tensor) -> None:
        nonlocal last
        calls[name] += 1
        version = 0 if x.is_inference() else x._version  # the tensor may be written in place
        if last is not None and last[0] is x and last[1] == version:
            leaders[name] = last[2]
        else:
            last = x, version, name

    with _observed(modules, see):
        run(batch)
    # What runs several times is given several tensors, and would have to share them all.
    return {n: lead if calls[n] == calls[lead] == 1 else n for n, lead in leaders.items()}


def _linear(name: str, module: nn.Module) -> Any:
    """The linear layer, inside of one that has adapters."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return module
    raise InputError(f"{name} is no linear layer: only these can start from data")


def _first_of(batches: Iterable[Any], method: str) -> tuple[Any, Iterator[Any]]:
    """The first batch and those after it."""
    stream = iter(batches)
    for first in stream:
        return first, stream
    raise InputError(f"{method} needs at least one batch of data, and there is none")


def _check_reached(modules: Modules, reached: set[str], method: str) -> None:
    if missing := [name for name in modules if name not in reached]:
        raise InputError(f"{method}: no token of the batches reached {listed(missing)}")


def _mask(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Which tokens of the batch count (batch, seq), None when it does not say."""
    fields = batch if isinstance(batch, Mapping) else {}
    mask, labels = fields.get("attention_mask"), fields.get("labels")
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    if ignored_label is None or labels is None or labels.dim() != 2:
        return mask
    counted = labels != ignored_label
    return counted if mask is None or mask.shape != counted.shape else mask & counted


def _rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x (…, d_in) as rows (n, d_in), of the tokens that count."""
    # An expert's input has not as many rows as there are tokens, and all of them count.
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).to(rows.device)]
    return at_least_float32(rows)
