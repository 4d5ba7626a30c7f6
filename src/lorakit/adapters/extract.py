"""An adapter out of a full fine-tune: the difference of two models, cut to a low rank.

Both are read from their files one tensor at a time; neither is loaded. What is not a linear
layer's matrix has no low-rank form in PEFT's files, and is kept whole (`modules_to_save`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit.adapters.adapter_tokenizer import tokenizer_to_keep
from lorakit.adapters.derived import KindRanks, Truncations, sha256, write_derived
from lorakit.adapters.manifest import Derivation, SourceRecord
from lorakit.adapters.resize import check_size
from lorakit.errors import InputError, listed
from lorakit.folder_lock import reserves
from lorakit.lora.architecture import is_conv1d, output_head
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.combination import Combined, truncate_matrix
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraLinear, layer_class
from lorakit.lora.targets import written_targets
from lorakit.lora.vocabulary import embeddings
from lorakit.models.layouts import layout_of
from lorakit.models.names import resolve
from lorakit.models.shards import ShardReader, StoredTensor, all_tensors
from lorakit.models.skeleton import file_names, read_base_config, skeleton
from lorakit.models.template_files import digest
from lorakit.progress import track

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Model:
    """A model's safetensors files; each tensor is read when it is asked for."""

    name: str
    folder: Path
    tensors: dict[str, StoredTensor]
    reader: ShardReader

    @classmethod
    @contextmanager
    def of(cls, name: str) -> Iterator[_Model]:
        """The model that `name` means, its files open within the block."""
        source = resolve(name)
        tensors = all_tensors(source.layout.shards())
        with ShardReader(tensor.path for tensor in tensors.values()) as reader:
            yield cls(name, source.path, tensors, reader)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.reader.read(self.tensors[key])


@dataclass(frozen=True)
class ExtractReport:
    """A written extraction.

    `kinds` has ranks and losses by kind of module, `retained` the share of ‖ΔW‖² that is kept by
    module's path; `error` is ‖ΔW - ΔW'‖ / ‖ΔW‖ over all of these. `whole` are the modules that
    are kept as they are.
    """

    output: str
    modules: int
    parameters: int
    error: float
    kinds: list[KindRanks]
    retained: dict[str, float]
    whole: list[str]
    notices: list[str]


@torch.no_grad()
@reserves("output")
def extract(
    base: str,
    tuned: str,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> ExtractReport:
    """Writes `tuned - base` as an adapter for `base` to the new folder `output`.

    Args:
        base, tuned: models of one architecture, with safetensors files.
        rank: at most this rank a module. Where it is less than half of what a matrix can have,
            the decomposition is by subspace iteration, which finds a difference of that rank or
            less exactly.
        energy: the share of each module's ‖ΔW‖² to keep, in (0, 1], by a full decomposition;
            each gets the least rank that does. None, without a rank, is 0.95.

    Raises:
        InputError: the two do not go together, do not differ, or differ in what an adapter
            cannot hold.
        LorakitError: the folder cannot be written.
    """
    if rank is None and energy is None:
        energy = 0.95
    check_size(rank, energy)
    with _Model.of(base) as before, _Model.of(tuned) as after:
        return _extract(before, after, output, rank, energy)


def _extract(
    before: _Model, after: _Model, output: str | Path, rank: int | None, energy: float | None
) -> ExtractReport:
    base, tuned = before.name, after.name
    kinds = [read_base_config(one.folder).model_type for one in (before, after)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{tuned} is a {kinds[1]} model and {base} a {kinds[0]}: only models of one "
            "architecture have a difference that an adapter can be"
        )
    model = skeleton(before.folder)
    keys = _same_parameters(model, before, after)
    rows, added = _tokens(model, keys, before, after)
    tokenizer = tokenizer_to_keep(before.folder, after.folder, rows, grown=added > 0)
    tensors: dict[str, torch.Tensor] = {}
    cut = Truncations()
    whole: list[str] = []
    notices: list[str] = []
    limit = 0
    for name, (own_key, key) in track(keys.items(), "comparing tensors"):
        old, new = before[own_key], after[key]
        path, _, own = name.rpartition(".")
        if old.shape != new.shape:  # it has more tokens
            _require_finite(new, tuned, key)
            whole.append(path)
            continue
        if torch.equal(old, new.to(old.dtype)) and old.dtype == new.dtype:
            continue
        delta = new.float() - old.float()
        if not torch.isfinite(delta).all():
            _require_finite(old, base, own_key)
            _require_finite(new, tuned, key)
        if not delta.any():
            continue
        module = model.get_submodule(path)
        is_linear = layer_class(module) is LoraLinear and module is not output_head(model)
        if own == "weight" and is_linear:
            delta = delta.T if is_conv1d(module) else delta  # which is stored (d_in, d_out)
            limit = max(limit, min(delta.shape))
            found = _cut(delta, rank, energy)
            cut.add(path, found)
            tensors[f"{PREFIX}{path}.lora_A.weight"] = found.A
            tensors[f"{PREFIX}{path}.lora_B.weight"] = found.B
        else:
            whole.append(path)
    whole = list(dict.fromkeys(whole))
    if not cut.ranks:
        raise InputError(
            f"{tuned} and {base} have the same linear layers: there is nothing to extract"
            + (f" (they differ in {listed(whole, 3)}, which has no low-rank form)" if whole else "")
        )
    if rank is not None and rank > limit:
        raise InputError(f"--rank {rank} is more than any module can have: the largest is {limit}")
    both = [path for path in whole if path in cut.ranks]
    if both:
        raise InputError(
            f"{tuned} has other biases than {base} beside its linear layers ({listed(both, 3)}), "
            "which an adapter for these layers cannot hold: keep the tuned model as it is"
        )
    if whole:
        notices.append(
            "kept whole (modules_to_save), as what differs there has no low-rank form: "
            f"{listed(whole, 4)}"
        )
    for path in whole:
        for name, _ in model.get_submodule(path).named_parameters():
            tensors[f"{PREFIX}{path}.{name}"] = after[keys[f"{path}.{name}"][1]]
    tied = {path: others for path, others in _tied(model).items() if path in whole}
    for path, others in tied.items():  # by name, for readers that do not know of tying
        whole += others
        tensors |= {
            f"{PREFIX}{other}.weight": tensors[f"{PREFIX}{path}.weight"] for other in others
        }
    config = LoraConfig(
        target_modules=written_targets(list(cut.ranks), model),
        modules_to_save=whole or None,  # in full: PEFT takes any name that ends like it
        ensure_weight_tying=bool(tied),
        fan_in_fan_out=any(is_conv1d(model.get_submodule(path)) for path in cut.ranks),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    if added:
        notices.append(
            f"{tuned} has {added} tokens that {base} has not: their embeddings are kept with all "
            "others, and its tokenizer goes along"
        )
    derivation = Derivation(
        made_by="extract",
        sources=[_source(files) for files in (before, after)],
        options={"rank": rank} if rank is not None else {"energy": energy},
        figures={"error": cut.error},
        base_model=base,
        notices=notices,
    )
    templates = layout_of(after.folder).templates()
    if templates is not None:
        derivation.template_sha256 = digest(templates)
    config = config.with_ranks(cut.ranks, inference_mode=True)
    write_derived(output, config, tensors, derivation, templates, tokenizer)
    return ExtractReport(
        str(output),
        len(cut.ranks),
        sum(tensor.numel() for tensor in tensors.values()),
        cut.error,
        cut.kinds(),
        cut.retained(),
        whole,
        notices,
    )


def _cut(delta: torch.Tensor, rank: int | None, energy: float | None) -> Combined:
    if rank is not None:
        return truncate_matrix(delta, rank)
    most = min(delta.shape)
    found = truncate_matrix(delta, most)  # of the full rank, so by a full decomposition
    # The factors share the singular values evenly: each has their roots as lengths.
    squares = found.A.double().square().sum(dim=1).square()
    held = squares.cumsum(0) >= (energy or 1.0) * squares.sum() * (1 - 1e-12)
    keep = min(most, int(torch.nonzero(held)[0]) + 1)
    lost = squares[keep:].sum().item()
    return Combined(found.A[:keep].clone(), found.B[:, :keep].clone(), found.energy, lost)


def _same_parameters(
    model: PreTrainedModel, before: _Model, after: _Model
) -> dict[str, tuple[str, str]]:
    """What both models' files call each of the parameters.

    They have the same shapes, but that embedding and head may have more rows in `after`.
    """
    names = [name for name, _ in model.named_parameters()]
    ours, theirs = (file_names(model, one.tensors) for one in (before, after))
    if lacking := [name for name in names if name not in ours.stored]:
        raise InputError(
            f"{before.name} lacks {listed(lacking, 3)} in its files, or holds it there in another "
            "form than its model has: this is not supported"
        )
    if lacking := [name for name in names if name not in theirs.stored]:
        raise InputError(
            f"{after.name} is not a fine-tune of {before.name}: it lacks {listed(lacking, 3)}"
        )
    if extra := theirs.unused - ours.unused:
        raise InputError(
            f"{after.name} is not a fine-tune of {before.name}: it also has "
            f"{listed(sorted(extra), 3)}"
        )
    for path, others in _tied(model).items():
        # A head that is tied in the base and has a weight of its own in the tuned model.
        weights = [f"{p}.weight" for p in (path, *others) if f"{p}.weight" in theirs.stored]
        first, *rest = (after[theirs.stored[name]] for name in weights)
        if not all(torch.equal(first, other) for other in rest):
            raise InputError(
                f"{after.name} has untied {listed(weights)}, which are one in {before.name}: "
                "save the base with tie_word_embeddings=false first"
            )
    keys = {name: (ours.stored[name], theirs.stored[name]) for name in names}
    ends = embeddings(model)
    for name, (own_key, key) in keys.items():
        old, new = before.tensors[own_key].shape, after.tensors[key].shape
        is_end = name.rpartition(".")[0] in ends and old[1:] == new[1:]
        if old == new or (is_end and old < new):
            continue
        if is_end:
            raise InputError(
                f"{after.name} has {new[0]} rows in {key} and {before.name} {old[0]}: an adapter "
                "cannot remove tokens, so give the tuned model its rows again "
                f"(model.resize_token_embeddings({old[0]})), save it, and extract from that"
            )
        raise InputError(
            f"{after.name} is not a fine-tune of {before.name}: {key} is {new} and not {old}"
        )
    return keys


def _tokens(
    model: PreTrainedModel, keys: dict[str, tuple[str, str]], before: _Model, after: _Model
) -> tuple[int, int]:
    """How many tokens the tuned model has embeddings for, and how many of them the base has not."""
    pairs = [keys[f"{path}.weight"] for path in embeddings(model) if f"{path}.weight" in keys]
    rows = [(before.tensors[own].shape[0], after.tensors[key].shape[0]) for own, key in pairs]
    if len({*rows}) > 1 and any(old != new for old, new in rows):
        raise InputError(
            f"{after.name} has {listed(str(new) for _, new in rows)} rows in "
            f"{listed(key for _, key in pairs)}: embedding and head must have the same tokens"
        )
    old, new = max(rows, default=(0, 0))
    return new, new - old


def _require_finite(tensor: torch.Tensor, model: str, key: str) -> None:
    if not torch.isfinite(tensor.float()).all():
        raise InputError(f"{model}: {key} holds NaN or Inf")


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """The paths of other modules that share their weight, by the first one's path."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            name = first.setdefault(id(weight), path)
            if name != path:
                found.setdefault(name, []).append(path)
    return found


def _source(model: _Model) -> SourceRecord:
    """A model as a source; the digest is of its only file, or of its shards' digests."""
    paths = sorted({tensor.path for tensor in model.tensors.values()})
    return SourceRecord(path=model.name, sha256=",".join(sha256(path) for path in paths))
