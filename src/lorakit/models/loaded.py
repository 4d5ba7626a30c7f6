"""A loaded model: what wraps it, what it draws, its output layer, and where its weights lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


def base_model(model: nn.Module) -> Any:
    """What `model.get_base_model()` gives, or `model` itself where it wraps nothing.

    Returns: Any, since torch's modules say of every attribute that it is a tensor or a module.
    """
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def writes_text(model: nn.Module) -> bool:
    """Whether `model` has a head that gives the next token; an encoder or a bare body has none."""
    can_generate = getattr(base_model(model), "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else True


def has_dropout(model: nn.Module) -> bool:
    """Whether anything of `model` draws dropout in training."""
    from torch import nn

    settings: Any = base_model(model).config.get_text_config()
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(rates) or bool(getattr(settings, "attention_dropout", None))


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in evaluation mode, in which it draws no dropout.

    Afterwards it is in the mode that it was in; a `LoraModel` without trainable parameters, which
    warns whoever puts it into training mode, does not warn here.
    """
    from torch import nn

    from lorakit.lora.model import LoraModel

    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if isinstance(model, LoraModel):
            nn.Module.train(model, was_training)
        else:
            model.train(was_training)


def copy_once(model: PreTrainedModel) -> RemovableHandle | None:
    """Copies the last positions of several rows before the output layer reads them.

    They are a slice of all positions. torch would multiply such a slice as a batch of products,
    each with a copy of its own of the layer's weight: for eight rows and the bundled model 0.4 s.

    Returns:
        What takes this back; None where there is no such layer.
    """
    head: nn.Module | None = model.get_output_embeddings()
    return None if head is None else head.register_forward_pre_hook(_contiguous)


@contextmanager
def copied_once(model: PreTrainedModel) -> Iterator[None]:
    """The same for the duration of a block."""
    handle = copy_once(model)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _contiguous(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = given
    return (first.contiguous(), *others)


def take_into_memory(model: nn.Module) -> None:
    """Copies the weights and buffers of `model` that are pages of a file, one after the other.

    safetensors maps files into memory, and a weight whose dtype is the file's stays there. Whoever
    writes to such a file changes the model that is being served, and whoever shortens it ends the
    process (SIGBUS).
    """
    import torch

    mapped = _mapped_files()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and _may_be_in(mapped, tensor):
            tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


def _may_be_in(mapped: list[tuple[int, int]] | None, tensor: torch.Tensor) -> bool:
    if mapped is None:  # unknown: what is an ordinary tensor is copied
        import torch

        return type(tensor.data) is torch.Tensor
    address = tensor.data_ptr()
    at = bisect_right(mapped, (address, address)) - 1
    return any(begin <= address < end for begin, end in mapped[max(at, 0) : at + 2])


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where files lie in memory, sorted; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        place, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return sorted(found)
