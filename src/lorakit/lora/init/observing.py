"""A model's inputs and gradients over batches, for initialisations from data.

The model is left as it was.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.architecture import is_conv1d
from lorakit.lora.init.decompose import at_least_float32

Modules = Mapping[str, nn.Module]
Run = Callable[[Any], Any]


@contextmanager
def observed(modules: Modules, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
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
def alone_trained(
    weights: Mapping[str, torch.Tensor],
    others: Iterable[torch.Tensor],
    add: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Only `weights` are trainable; `add(name, gradient)` takes the gradients of a backward."""

    def take(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            add(name, weight.grad)
            weight.grad = None

    all_of_them = {id(p): p for p in (*others, *weights.values())}.values()
    before = [(p, p.requires_grad, p.grad) for p in all_of_them]
    handles = []
    try:
        for parameter in all_of_them:
            parameter.requires_grad_(False)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            weight.grad = None
            handles.append(weight.register_post_accumulate_grad_hook(partial(take, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def in_mode(model: nn.Module | None, *, training: bool) -> Iterator[None]:
    """`model` in training or evaluation mode, every module in its own again afterwards."""
    before = {} if model is None else {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, was in before.items():
            module.training = was


def leaders_of(modules: Modules, run: Run, batch: Any) -> dict[str, str]:
    """For each module the first that is given the same tensor as it is, in a run of `batch`."""
    leaders = {name: name for name in modules if linear_base(name, modules[name])}
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

    with observed(modules, see):
        run(batch)
    # A module that runs several times would have to share every one of its inputs.
    return {n: lead if calls[n] == calls[lead] == 1 else n for n, lead in leaders.items()}


def linear_base(name: str, module: nn.Module) -> Any:
    """The linear layer, inside of one that has adapters."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return module
    raise InputError(f"{name} is not a linear layer, and only linear layers start from data")


def first_of(batches: Iterable[Any], method: str) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them."""
    stream = iter(batches)
    for first in stream:
        return first, itertools.chain([first], stream)
    raise InputError(f"{method} needs at least one batch of data, and there is none")


def check_reached(modules: Modules, reached: set[str], method: str) -> None:
    if missing := [name for name in modules if name not in reached]:
        raise InputError(f"{method}: no token of the batches reached {listed(missing)}")


def counted_tokens(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Which tokens of the batch count (batch, seq), None when it does not say."""
    fields = batch if isinstance(batch, Mapping) else {}
    mask, labels = fields.get("attention_mask"), fields.get("labels")
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    if ignored_label is None or labels is None or labels.dim() != 2:
        return mask
    counted = labels != ignored_label
    return counted if mask is None or mask.shape != counted.shape else mask & counted


def as_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x (…, d_in) as rows (n, d_in), of the tokens that count."""
    # An expert's input has not as many rows as there are tokens, and all of them count.
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).to(rows.device)]
    return at_least_float32(rows)
