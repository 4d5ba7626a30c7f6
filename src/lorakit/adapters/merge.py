"""Merging adapters into their base model's files, and proving that nothing was lost on the way.

The order of things is here: read, merge file by file (`plan.py`, `streaming.py`) or in memory
(`in_memory.py`), compare with base + adapter (`verify.py`). The sum is made in at least float32
and rounded once. A folder gets its name only when all of it is written and checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import atomic
from lorakit.adapters.open import TEMPLATE_NAME, AdapterFiles, OpenAdapter, open_adapter, read_files
from lorakit.errors import InputError, LorakitError, listed

if TYPE_CHECKING:
    import torch

    from lorakit.adapters.survival import Survival
    from lorakit.adapters.verify import Comparison

# What is copied besides the weights; the rest of a model's folder is for other frameworks.
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_OWN = {"config.json", "adapter_config.json", "lorakit.json"}


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how it compares with base + adapter.

    Attributes:
        dtype: the one that most of the written values have.
        modules: the number of layers into which adapters were merged.
        streamed: whether the model was merged file by file, and not in memory.
        survived: the share of ΔW that rounding to the written dtype left, over all modules.
        survived_by_module: the same of every module, by path.
        notices: what was left out, or done in another way than asked for.
        positions, largest_difference, …: as in `verify.Comparison`; None without verifying.
    """

    output: str
    dtype: str
    modules: int
    streamed: bool
    survived: float
    survived_by_module: dict[str, float] = field(repr=False)
    notices: tuple[str, ...] = ()
    positions: int | None = None
    largest_difference: float | None = None
    largest_logit: float | None = None
    adapter_effect: float | None = None
    lost_share: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    passed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What is merged into what."""

    adapters: list[AdapterFiles]
    weights: list[float]
    base_model: str
    base: str | None
    path: Path
    dtype: torch.dtype | None

    @property
    def first(self) -> AdapterFiles:
        return self.adapters[0]


@dataclass
class _Written:
    """What a way of merging has written."""

    kind: type
    dtype: torch.dtype
    modules: int
    survival: Survival
    notices: list[str]


def merge(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    in_memory: bool = False,
    verify: bool = True,
) -> MergeReport:
    """Writes the plain model `base + adapter` to the folder `output`, checked.

    Memory is about the largest tensor's, as the model's files are merged one tensor after the
    other; verifying loads the model. The base and the adapters are only read.

    Args:
        adapter: the adapter's folder, or several, whose updates are added up.
        output: a folder that is new or empty; any tool loads it without lorakit.
        base: the base model, when another than the recorded one is meant.
        dtype: the dtype of the written weights; None for that of each of the base's tensors.
        weights: what each adapter's update is multiplied by; None is 1 for all.
        in_memory: load the model, merge, and save it, as `merge_and_unload` does.
        verify: read the result back and compare its answers with those of base + adapter.

    Raises:
        InputError: an adapter, the base or the output folder cannot be used.
        LorakitError: the merged model differs from base + adapter; nothing is left behind.
    """
    from lorakit.adapters.verify import compare, expect

    atomic.require_free(output)
    job = _prepare(adapter, base, dtype, weights)
    reason = "" if in_memory else _obstacle(job)
    with atomic.new_folder(output) as folder:
        written = None
        if not (in_memory or reason):
            written = _stream(job, folder)
            if isinstance(written, str):
                reason, written = written, None
        expected = None
        if verify or written is None:
            opened, names = _open(job)
            expected = expect(opened.model, opened.tokenizer) if verify else None
            if written is None:
                written = _in_memory(job, opened, names, folder)
                if reason:
                    written.notices.insert(0, f"merged in memory: {reason}")
            del opened
        report = MergeReport(
            output=str(output),
            dtype=str(written.dtype).removeprefix("torch."),
            modules=written.modules,
            streamed=not (in_memory or reason),
            survived=written.survival.total,
            survived_by_module=dict(written.survival.by_module),
            notices=tuple(written.notices),
        )
        if expected is not None:
            report = _checked(report, compare(expected, folder, written.kind))
    return report


def _prepare(
    adapter: str | Path | Sequence[str | Path],
    base: str | None,
    dtype: str | None,
    weights: Sequence[float] | None,
) -> _Job:
    from lorakit.adapters.together import check_weights
    from lorakit.models.load import DTYPES, torch_dtype
    from lorakit.models.names import resolve

    folders = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    if not folders:
        raise InputError("give an adapter's folder")
    chosen = None
    if dtype is not None:
        if dtype not in DTYPES[1:]:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES[1:])}, not {dtype!r}")
        chosen = torch_dtype(dtype, "cpu")
    adapters = [read_files(folder, base) for folder in folders]
    numbers = [1.0] * len(adapters) if weights is None else list(weights)
    check_weights(adapters, numbers)
    first = adapters[0]
    for other in adapters[1:]:
        for what, one, two in (
            ("base model", first.base_model, other.base_model),
            ("task_type", first.task_type, other.task_type),
        ):
            if one != two:
                hint = ": give --base" if what == "base model" else ""
                raise InputError(
                    f"{first.folder} is for the {what} {one}, and {other.folder} for {two}{hint}"
                )
    path = resolve(first.base_model).path
    return _Job(adapters, numbers, first.base_model, base, path, chosen)


def _obstacle(job: _Job) -> str:
    """Why the base cannot be merged file by file; empty where it can."""
    from lorakit.lora.checkpoint import INITIAL_NAME

    if job.path.is_file():
        return "a GGUF file is unpacked as a whole"
    if method := _quantization(job):
        return f"the base is quantised ({method}), so it was unpacked and is written unquantised"
    for adapter in job.adapters:
        config = adapter.config
        if config.layer_replication:
            return "layer_replication builds another model than the one in the files"
        if config.init_lora_weights == "loftq":
            return "loftq quantises the base's weights anew"
        if config.takes_start_off and not (adapter.folder / INITIAL_NAME).is_file():
            return f"{config.init_lora_weights} takes its start out of the loaded weights"
    return ""


def _quantization(job: _Job) -> str:
    """How the base's files are quantised; empty where they are not."""
    from transformers import AutoConfig

    if job.path.is_file():
        return ""
    config = AutoConfig.from_pretrained(job.path, local_files_only=True)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    values = settings if isinstance(settings, dict) else settings.to_dict()
    return str(values.get("quant_method", "unknown"))


def _stream(job: _Job, folder: Path) -> _Written | str:
    """Merges file by file; or says why that cannot be done."""
    import torch

    from lorakit.adapters.plan import NotStreamable, finish_plan, start_plan
    from lorakit.adapters.streaming import check_copies, come_apart, write_merged
    from lorakit.adapters.together import add_others
    from lorakit.lora import LoraModel
    from lorakit.models.load import set_padding
    from lorakit.models.shards import read_shards
    from lorakit.models.skeleton import file_names, skeleton

    shards = read_shards(job.path)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    exact = _exact_dtype(job, {tensor.code for tensor in tensors.values()})
    model = skeleton(job.first.task_type, job.path, exact, job.first.labels)
    stored = file_names(model, tensors)
    own = dict(model.state_dict(keep_vars=True))
    adapted = LoraModel.from_pretrained(model, job.first.folder)
    names = add_others(adapted, job.adapters, job.weights)
    from lorakit.models.shards import ShardReader

    with ShardReader() as reader:
        try:
            plan = start_plan(adapted.get_base_model(), own, shards, stored, names)
            for adapter in job.adapters:
                check_copies(plan, adapter.tensors, adapter.folder, reader)
            apart = come_apart(plan, reader)
            finish_plan(plan, own, shards, stored, apart, job.dtype)
        except NotStreamable as why:
            return str(why)
        survival = write_merged(folder, plan, reader)
    sizes: dict[torch.dtype, int] = {}
    for entries in plan.shards.values():
        for entry in entries.values():
            sizes[entry.new.dtype] = sizes.get(entry.new.dtype, 0) + entry.new.size
    usual = max(sizes, key=lambda one: sizes[one])
    config: Any = model.config
    if apart:
        config.tie_word_embeddings = False
        plan.notices.append(
            f"{listed(apart)} had its values from another tensor, and has its own now: "
            "tie_word_embeddings is false"
        )
    config.dtype = usual
    config.architectures = [type(model).__name__]
    tokenizer = _copy_others(job, folder)
    if tokenizer is not None:
        set_padding(model, tokenizer.pad_token_id)
    config.save_pretrained(folder)
    return _Written(type(model), usual, plan.modules, survival, plan.notices)


def _exact_dtype(job: _Job, codes: set[str]) -> torch.dtype:
    """float32, or float64 where the base's or an adapter's files have it."""
    import torch

    wide = any(t.dtype == torch.float64 for a in job.adapters for t in a.tensors.values())
    return torch.float64 if wide or "F64" in codes else torch.float32


def _open(job: _Job) -> tuple[OpenAdapter, list[str]]:
    """The base with all adapters on it, in memory."""
    from lorakit.adapters.together import add_others
    from lorakit.models.shards import read_shards

    codes: set[str] = set()
    if job.path.is_dir():
        codes = {t.code for shard in read_shards(job.path).values() for t in shard.values()}
    exact = _exact_dtype(job, codes)
    opened = open_adapter(job.first.folder, base=job.base, dtype=exact, dequantize=True)
    return opened, add_others(opened.model, job.adapters, job.weights)


def _in_memory(job: _Job, opened: OpenAdapter, names: list[str], folder: Path) -> _Written:
    import torch

    from lorakit.adapters.in_memory import merge_loaded, save_loaded
    from lorakit.models.load import stored_dtype
    from lorakit.models.shards import read_shards
    from lorakit.models.skeleton import file_names

    base: Any = opened.model.get_base_model()
    default = job.dtype or stored_dtype(job.base_model)
    dtypes: dict[str, torch.dtype] = {}
    if job.dtype is None and job.path.is_dir() and not _quantization(job):
        shards = read_shards(job.path)
        tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        dtypes = {
            key: tensors[name].dtype for key, name in file_names(base, tensors).stored.items()
        }
    merged, survival, modules = merge_loaded(opened.model, names, dtypes, default)
    save_loaded(merged, folder, default)
    if job.path.is_file() or _copy_others(job, folder) is not None:
        opened.tokenizer.save_pretrained(folder)
    return _Written(type(merged), default, modules, survival, [])


def _copy_others(job: _Job, folder: Path) -> Any:
    """Copies the base's tokenizer, generation settings and templates, and the adapter's template.

    Returns: the tokenizer with its padding token, which a new head needs; else None.
    """
    for path in sorted(job.path.iterdir()):
        small = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if small and path.name not in _OWN and not path.name.endswith(".index.json"):
            if path.is_symlink() and not path.exists():
                raise InputError(f"model: {path} is a link that leads nowhere, or in a circle")
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    template = job.first.folder / TEMPLATE_NAME
    if template.is_file():
        shutil.copyfile(template, folder / TEMPLATE_NAME)
    if job.first.task_type == "CAUSAL_LM":
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.path, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return tokenizer


def _checked(report: MergeReport, comparison: Comparison) -> MergeReport:
    """The report with the comparison in it.

    Raises:
        LorakitError: the two models differ by more than rounding explains.
    """
    import dataclasses

    if not comparison.within(report.dtype):
        raise LorakitError(
            f"the merged model is not base + adapter: logits differ by up to "
            f"{comparison.largest_difference:.4g}, {comparison.lost_share:.0%} of what the adapter "
            f"does is lost in {report.dtype}, top-1 agreement {comparison.top1_agreement:.1%}. "
            "Nothing was written; try --dtype float32"
        )
    return dataclasses.replace(report, passed=True, **asdict(comparison))
