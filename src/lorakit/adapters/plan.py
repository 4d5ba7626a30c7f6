"""What every tensor of a merged model is made of: of the base's files, of adapters, or of both.

The model is there without weights, with the adapters on it: its layers say what changes. Reading,
adding and writing are `streaming.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.layers import (
    LoraTiedEmbedding,
    LoraTiedHead,
    ModulesToSaveWrapper,
    TiedModule,
    WrappedModule,
)
from lorakit.lora.wrapping import wrapped_modules
from lorakit.models.shards import NewTensor, StoredTensor, all_tensors, code_of, usual_dtype
from lorakit.models.skeleton import FileNames

Shards = Mapping[str, Mapping[str, StoredTensor]]

_FLOATS = ("F64", "F32", "BF16", "F16")


class NotStreamable(Exception):  # noqa: N818 (no error: there is another way)
    """Why a model has to be loaded for this merge."""


@dataclass(frozen=True)
class ParameterChange:
    """What happens to a parameter: a layer merges adapters into it, or a tensor replaces it.

    `path` is the module's in the plain model, `names` are the adapters that the layer has.
    `weight` is how much of the way to what was trained whole is gone.
    """

    path: str
    layer: WrappedModule | None = None
    parameter: str = ""
    names: tuple[str, ...] = ()
    replaced: torch.Tensor | None = None
    weight: float = 1.0

    @property
    def same_as(self) -> int:
        """Changes with the same number make the same of the same tensor."""
        if isinstance(self.layer, (LoraTiedHead, LoraTiedEmbedding)):
            return id(self.layer.embedding)
        return id(self.replaced if self.layer is None else self.layer)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: from the base's file, from an adapter, or from both.

    Buffers may hold Inf, as limits that do not limit (Gemma 4).
    """

    new: NewTensor
    source: StoredTensor | None
    change: ParameterChange | None
    is_buffer: bool = False


@dataclass
class MergePlan:
    """What is written into which file.

    `changes` are by the parameter's name in the plain model, `sources` where its values are in
    the base's files; `pairs` are names of parameters that are one in the base, and may not be in
    the merged model. `notices` say what is left out.
    """

    changes: dict[str, ParameterChange]
    sources: dict[str, StoredTensor]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    shards: dict[str, dict[str, Entry]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def modules(self) -> int:
        """The number of layers that merge adapters into themselves."""
        return len({c.same_as for c in self.changes.values() if c.layer is not None})

    @property
    def usual_dtype(self) -> torch.dtype:
        """The dtype that most of the written values have."""
        every = (entry.new for entries in self.shards.values() for entry in entries.values())
        return usual_dtype(new for new in every if new.code in _FLOATS) or torch.float32


def find_changes(
    model: nn.Module, own: Mapping[str, torch.Tensor], weights: Mapping[str, float]
) -> dict[str, ParameterChange]:
    """What adapters change, by the name of the parameter in the plain model.

    Args:
        own: the plain model's tensors, taken before it was wrapped.
        weights: of the adapters, by name, which the layers know.
    """
    names, first = list(weights), next(iter(weights.values()))
    changes = {
        key: ParameterChange(key.rpartition(".")[0], replaced=tensor, weight=first)
        for key, tensor in own.items()
        if not tensor.is_meta  # a bias that the only adapter has trained
    }
    for wrapped_path, module in wrapped_modules(model):
        path = wrapped_path.replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            module.require_together(names)
            for name in module.adapters:
                for ending, tensor in module.adapter_tensors(name).items():
                    changes[f"{path}.{ending}"] = ParameterChange(
                        path, replaced=tensor, weight=weights[name]
                    )
            continue
        layer = module.embedding if isinstance(module, TiedModule) else module
        here = [name for name in names if name in layer.adapters]
        for parameter in layer.changed_parameters(here) if here else []:
            key = f"{path}.{parameter}"
            weight = changes[key].weight if key in changes else 1.0  # of a trained bias
            changes[key] = ParameterChange(path, layer, parameter, tuple(here), weight=weight)
    return changes


def start_plan(
    model: nn.Module,
    own: Mapping[str, torch.Tensor],
    shards: Shards,
    stored: FileNames,
    weights: Mapping[str, float],
) -> MergePlan:
    """Finds what changes, and where the values before are.

    Args:
        model: on the meta device, wrapped, with the values of the adapters.
        own, weights: as in `find_changes`.
        shards, stored: the base's files, and what they call the model's tensors.

    Raises:
        InputError: base and adapters do not fit, or cannot be merged.
        NotStreamable: the model must be loaded.
    """
    in_files = all_tensors(shards)
    sources = {key: in_files[name] for key, name in stored.stored.items()}
    plan = MergePlan(find_changes(model, own, weights), sources)
    for key, tensor in sources.items():
        if tensor.shape != tuple(own[key].shape):
            change = plan.changes.get(key)
            if change is not None and change.replaced is not None:
                continue  # a head for other labels, an embedding with more tokens
            if change is not None:
                raise NotStreamable(f"the adapter's {key} has more rows than the base's")
            raise InputError(
                f"model: {stored.stored[key]} has the shape {tensor.shape} in {tensor.path}, and "
                f"the model's configuration needs {tuple(own[key].shape)}"
            )
    _share_sources(plan, own, stored)
    for key, one in own.items():
        change = plan.changes.get(key)
        if key in sources or (change is None and not isinstance(one, nn.Parameter)):
            continue
        if change is None and stored.converted:
            continue  # made of converted tensors, which stay as they are
        if change is not None and change.replaced is not None and not stored.converted:
            if change.weight != 1:
                raise InputError(
                    f"--weights: the base's files have no {key}, so there is no part of the "
                    f"adapter's: give it the weight 1, not {change.weight:g}"
                )
            continue  # new in the adapter
        raise NotStreamable(f"the base's files do not hold {key} as the model has it")
    return plan


def _share_sources(plan: MergePlan, own: Mapping[str, torch.Tensor], stored: FileNames) -> None:
    """Gives parameters that are one the source of the one that the files have."""
    groups: dict[int, list[str]] = {}
    for key, tensor in own.items():
        groups.setdefault(id(tensor), []).append(key)
    for keys in groups.values():
        there = [key for key in keys if key in plan.sources]
        if len(keys) == 1 or not there:
            continue
        for key in keys:
            plan.sources.setdefault(key, plan.sources[there[0]])
        changes = [plan.changes.get(key) for key in keys]
        if len({change and change.same_as for change in changes}) == 1:
            for key in keys:
                if key not in stored.stored:
                    plan.changes.pop(key, None)  # as the others': it is not written
        elif len(keys) > 2:
            raise NotStreamable(f"{listed(keys)} are one, and only some of them change")
        else:
            plan.pairs.append((there[0], next(key for key in keys if key != there[0])))


def finish_plan(
    plan: MergePlan,
    own: Mapping[str, torch.Tensor],
    shards: Shards,
    stored: FileNames,
    apart: Sequence[str],
    dtype: torch.dtype | None,
) -> None:
    """Decides which tensors go into which file, under which name and in which dtype.

    They keep the base's files and names. Where the model has tensors that the base's files lack
    all get the model's own names, as `save_pretrained` gives them.

    Args:
        apart: parameters that were one with others, and get a place of their own.
        dtype: of floating tensors; None keeps each one's own.

    Raises:
        NotStreamable: the model must be loaded.
    """
    still_one = {other for _, other in plan.pairs} - {*apart}
    added = [key for key in plan.changes if key not in stored.stored and key not in still_one]
    added += [key for key in apart if key not in added and key not in stored.stored]
    new = any(key not in plan.sources for key in added)
    renamed = bool(added) and any(key != name for key, name in stored.stored.items())
    if (renamed or new) and stored.converted:
        raise NotStreamable("the base's files have other names than the model")
    left_out = stored.unused if renamed or new else frozenset()
    if left_out:
        plan.notices.append(
            f"left out, as this form of the model does not use them: {listed(sorted(left_out), 3)}"
        )
    keys = {name: key for key, name in stored.stored.items()}
    for file, tensors in shards.items():
        entries = {}
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
            if name in left_out:
                continue
            key = keys.get(name, name)
            shape = tuple(own[key].shape) if key in own else tensor.shape
            buffer = not shape or (key in own and not isinstance(own[key], nn.Parameter))
            written = _as_written(tensor, shape, dtype)
            entry = Entry(written, tensor, plan.changes.get(key), buffer)
            entries[key if renamed else name] = entry
        if entries:
            plan.shards[file] = entries
    last = plan.shards[max(plan.shards)]
    usual = code_of(plan.usual_dtype)
    for key in added:
        source, shape = plan.sources.get(key), tuple(own[key].shape)
        floating = own[key].is_floating_point()
        like = source or NewTensor(usual if floating else code_of(own[key].dtype), shape)
        last[key] = Entry(_as_written(like, shape, dtype), source, plan.changes.get(key))
    # Wide values first, so that each tensor begins at a multiple of its own values' size.
    for file, entries in plan.shards.items():
        ordered = sorted(entries.items(), key=lambda item: -item[1].new.dtype.itemsize)
        plan.shards[file] = dict(ordered)


def _as_written(tensor: NewTensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> NewTensor:
    code = tensor.code if dtype is None or tensor.code not in _FLOATS else code_of(dtype)
    return NewTensor(code, shape)
