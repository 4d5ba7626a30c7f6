"""Merging adapters into their base model's files, and proving that nothing was lost on the way.

The order of things is here: read (`job.py`), merge file by file (`plan.py`, `streaming.py`) or
in memory (`in_memory.py`), compare (`verify.py`). The sum is made in at least float32
and rounded once. A folder gets its name only when all of it is written and checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import atomic
from lorakit.errors import LorakitError
from lorakit.folder_lock import reserves

if TYPE_CHECKING:
    from lorakit.adapters.verify import Comparison


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


@reserves("output")
def merge(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    quantization: str | None = None,
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
        quantization: how the base's weights are rounded first (`nf4`, `fp4`, `int8` or `none`);
            None is as the adapters were trained beside them.
        in_memory: load the model, merge, and save it, as `merge_and_unload` does.
        verify: read the result back and compare its answers with those of base + adapter.

    Raises:
        InputError: an adapter, the base or the output folder cannot be used.
        LorakitError: the merged model differs from base + adapter; nothing is left behind.
    """
    from lorakit.adapters.in_memory import merge_in_memory, open_all
    from lorakit.adapters.job import obstacle, prepare, template_notices
    from lorakit.adapters.plan import NotStreamable
    from lorakit.adapters.streaming import stream
    from lorakit.adapters.verify import compare, expect

    job = prepare(adapter, base, dtype, weights, quantization)
    notices = template_notices(job)
    with atomic.new_folder(output) as folder:
        written = expected = None
        reason = "" if in_memory else obstacle(job)
        if not in_memory and not reason:
            try:
                written = stream(job, folder)
            except NotStreamable as why:
                reason = str(why)
        if verify or written is None:
            opened, names = open_all(job, notices.append)
            if verify:
                expected = expect(opened.model, opened.tokenizer, opened.added_tokens)
            if written is None:
                written = merge_in_memory(job, opened, names, folder)
            del opened  # its memory is for the merged model
        if reason:
            notices.insert(0, f"merged in memory: {reason}")
        report = MergeReport(
            output=str(output),
            dtype=str(written.dtype).removeprefix("torch."),
            modules=written.modules,
            streamed=not (in_memory or reason),
            survived=written.survival.total,
            survived_by_module=dict(written.survival.by_module),
            notices=tuple(dict.fromkeys((*notices, *written.notices))),
        )
        if expected is not None:
            report = _checked(report, compare(expected, folder, written.kind))
    return report


def _checked(report: MergeReport, comparison: Comparison) -> MergeReport:
    """The report with the comparison in it; LorakitError where rounding does not explain it."""
    if not comparison.within(report.dtype):
        raise LorakitError(
            f"the merged model is not base + adapter: logits differ by up to "
            f"{comparison.largest_difference:.4g}, {comparison.lost_share:.0%} of what the adapter "
            f"does is lost in {report.dtype}, top-1 agreement {comparison.top1_agreement:.1%}. "
            "Nothing was written; try --dtype float32"
        )
    return replace(report, passed=True, **asdict(comparison))
