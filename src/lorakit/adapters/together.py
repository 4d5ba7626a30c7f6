"""Several adapters on one model at once, each with a weight: the sum of their weighted updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit.errors import InputError

if TYPE_CHECKING:
    import torch

    from lorakit.adapters.adapter_files import AdapterFiles
    from lorakit.lora import LoraModel


def check_weights(adapters: Sequence[AdapterFiles], weights: Sequence[float]) -> None:
    """Raises InputError unless each adapter has a weight that it can be multiplied by."""
    from lorakit.models.forms import CLASSIFICATION

    if len(weights) != len(adapters):
        raise InputError(f"--weights: {len(weights)} numbers for {len(adapters)} adapters")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not -1e6 < weight < 1e6:
            raise InputError(f"--weights: {weight} is no weight")
        if weight != 1 and adapter.task_type in CLASSIFICATION:
            raise InputError(
                f"--weights: {adapter.folder} brings a classifier's head, of which the base has "
                f"none, so that there is no part of it: give it the weight 1, not {weight:g}"
            )


def add_others(
    model: LoraModel,
    adapters: Sequence[AdapterFiles],
    weights: Sequence[float],
    added_tokens: int = 0,
) -> dict[str, float]:
    """Loads all but the first of `adapters`, which is there, and makes all of them active.

    What each changes is multiplied by its weight: of `W` that was trained whole, to `V`,
    `W + weight (V - W)` is left. Where the model has no values that is `plan.py`'s to do.

    Args:
        added_tokens: how many tokens the model got for the first adapter.

    Returns: their weights by their names in the model.

    Raises:
        InputError: one does not fit the base, or cannot stand beside the others.
    """
    from lorakit.lora.injection import wrapped_modules
    from lorakit.lora.layers import Mergeable
    from lorakit.lora.layers.rows import in_part
    from lorakit.lora.targets import unwrapped
    from lorakit.lora.vocabulary import embeddings, rows_in_file

    if added_tokens and weights[0] != 1:
        raise InputError(
            f"--weights: {adapters[0].folder} brings {added_tokens} tokens that the base does not "
            f"have, so that there is no part of them: give it the weight 1, not {weights[0]:g}"
        )
    base = model.get_base_model()
    for adapter in adapters[1:]:
        for path, module in embeddings(base).items():
            rows, own = rows_in_file(adapter.tensors, path), len(unwrapped(module).weight)
            if rows not in (None, own):
                raise InputError(
                    f"{adapter.folder} is for a model with {rows} tokens, and {adapters[0].folder} "
                    f"for {own}: if it only adds some to these, give it as the first adapter"
                )
    names = ["default", *(f"adapter_{i}" for i in range(1, len(adapters)))]
    for name, adapter in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(adapter.folder, name)
    model.set_adapter(names, inference_mode=True)
    by_name = dict(zip(names, weights, strict=True))
    for _, module in wrapped_modules(model.get_base_model()):
        if isinstance(module, Mergeable):
            for name in module.adapters:
                module.take_part(name, by_name[name])
    done: set[int] = set()
    for W, V, weight in _trained_whole(model, by_name):
        if id(V) not in done and not W.is_meta:  # once, also where an embedding is the head
            V.data = in_part(W, V.detach(), weight)
            done.add(id(V))
    return by_name


def _trained_whole(
    model: LoraModel, weights: Mapping[str, float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """The base's tensors that adapters have trained whole, the trained ones, and the weights."""
    from lorakit.lora.injection import wrapped_modules
    from lorakit.lora.layers import ModulesToSaveWrapper

    for _, module in wrapped_modules(model.get_base_model()):
        if isinstance(module, ModulesToSaveWrapper):
            before = module.original_module.state_dict(keep_vars=True)
            for name in module.adapters:
                for ending, trained in module.adapter_tensors(name).items():
                    yield before[ending], trained, weights[name]
    if model.biases is not None:  # those of one adapter, which is alone
        (weight,) = weights.values()
        yield from ((*pair, weight) for pair in model.biases.pairs())
