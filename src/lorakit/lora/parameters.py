"""Parameters of adapters: which are trained, how many there are, and on which device."""

from collections.abc import Iterable

import torch
from torch import nn

from lorakit.weight_formats import format_of


def set_trainable(tensors: Iterable[torch.Tensor], trainable: bool) -> None:
    """Makes parameters trainable or frozen; buffers and tied views are skipped."""
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trainable)


def to_meta(tensors: Iterable[torch.Tensor]) -> None:
    """Moves parameters to the meta device, where they have a shape and no values."""
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
            torch.utils.swap_tensors(tensor, empty)


def tied_apart(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, __: object) -> None:
    """A hook for `state_dict`: tensors that share memory become copies, as safetensors needs.

    transformers' `Trainer` writes the state of a model that it does not know in one such file.
    """
    if prefix or any(isinstance(tensor, nn.Parameter) for tensor in state.values()):
        return  # a part of a larger model, or `keep_vars`: the tensors themselves are wanted
    seen: set[int] = set()
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        if address and address in seen:
            state[name] = tensor.clone()
        seen.add(address)


def numbers_in(parameter: torch.Tensor) -> int:
    """The number of values, those of the unpacked weight where it is quantised."""
    stored = format_of(parameter)
    return parameter.numel() if stored is None else stored.numel(parameter)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters and of all, without the backups of merged weights."""
    sizes = [
        (numbers_in(parameter), parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if "._before_merge." not in name
    ]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
