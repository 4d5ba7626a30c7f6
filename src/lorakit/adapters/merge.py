"""Merging an adapter into its base model, and proving that nothing was lost on the way.

The sum is made in float32 and rounded once. The result is read back from the disk and compared
with base + adapter before it gets its name, so a folder that exists is a merge that was checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import atomic
from lorakit.adapters.open import open_adapter
from lorakit.errors import InputError, LorakitError

if TYPE_CHECKING:
    import torch
    from torch import nn

# What is compared: several scripts, code and numbers, so that many parts of the model take part.
_PROBES = (
    "The capital of France is Paris, and the river that flows through it is the Seine.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    '{"item": "mug", "quantity": 3, "color": "red"}',
    "低秩适配在冻结的权重旁边训练两个小矩阵。",
    "1 + 1 = 2, 2 + 2 = 4, 4 + 4 =",
)

# The most of the adapter's effect on the logits that rounding may cost, and the least share of
# positions at which both must prefer the same token. A merge that forgot the adapter loses 1.
_TOLERANCE = {"float32": (0.01, 0.99), "float64": (0.01, 0.99)}
_HALF_TOLERANCE = (0.5, 0.9)
_NO_DIFFERENCE = 1e-4  # of the largest logit: what the order of float32 sums explains


@dataclass(frozen=True)
class MergeReport:
    """How a merged model compares with base + adapter, over the positions of fixed texts.

    Differences are of logits computed in float32. `adapter_effect` is the largest distance that
    the adapter moves one from the bare base, and `lost_share` the norm of all differences over
    the norm of all that the adapter moves: 0 is a perfect merge, 1 one without the adapter.
    """

    output: str
    dtype: str
    modules: int
    positions: int
    largest_difference: float
    largest_logit: float
    adapter_effect: float
    lost_share: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """Whether the difference is no more than rounding to `dtype` explains."""
        lost, agreement = _TOLERANCE.get(self.dtype, _HALF_TOLERANCE)
        same = self.largest_difference <= _NO_DIFFERENCE * self.largest_logit
        return same or (self.lost_share <= lost and self.top1_agreement >= agreement)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self) | {"passed": self.passed}


def merge(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str | None = None
) -> MergeReport:
    """Writes the plain model `base + adapter` to the folder `output`, checked.

    Args:
        adapter: the adapter's folder.
        output: a folder that is new or empty; any tool loads it without lorakit.
        base: the base model, when another than the recorded one is meant.
        dtype: the dtype of the written weights; None for that of the base model's files.

    Raises:
        InputError: the adapter, the base or the output folder cannot be used.
        LorakitError: the merged model differs from base + adapter; nothing is left behind.
    """
    import torch

    from lorakit.models.load import most_tokens

    atomic.require_free(output)
    opened = open_adapter(adapter, base=base, dtype="float32")
    model, tokenizer = opened.model, opened.tokenizer
    written = _output_dtype(opened.base_model, dtype)
    places = most_tokens(model, 1024)
    probes = [tokenizer(text, return_tensors="pt").input_ids[:, :places] for text in _PROBES]
    expected = _logits(model, probes)
    with model.disable_adapter():
        bare = _logits(model, probes)
    modules = sum(1 for name in model.state_dict() if ".lora_B." in name or "_embedding_B" in name)
    merged = model.merge_and_unload(safe_merge=True).to(written)
    with atomic.new_folder(output) as folder:
        merged.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        found = _logits(_reload(type(merged), folder), probes)
        moved = (bare - expected).norm().clamp(min=torch.finfo(torch.float32).tiny)
        report = MergeReport(
            output=str(output),
            dtype=str(written).removeprefix("torch."),
            modules=modules,
            positions=len(expected),
            largest_difference=(found - expected).abs().max().item(),
            largest_logit=expected.abs().max().item(),
            adapter_effect=(bare - expected).abs().max().item(),
            lost_share=((found - expected).norm() / moved).item(),
            top1_agreement=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        )
        if not torch.isfinite(found).all() or not report.passed:
            raise LorakitError(
                f"the merged model is not base + adapter: logits differ by up to "
                f"{report.largest_difference:.4g}, {report.lost_share:.0%} of what the adapter "
                f"does is lost in {report.dtype}, top-1 agreement {report.top1_agreement:.1%}. "
                "Nothing was written; try --dtype float32"
            )
    return report


def _output_dtype(base_model: str, dtype: str | None) -> torch.dtype:
    """The asked-for dtype, or the one that the base model's files have."""
    from lorakit.models.load import DTYPES, stored_dtype, torch_dtype

    if dtype is not None:
        if dtype not in DTYPES[1:]:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES[1:])}, not {dtype!r}")
        return torch_dtype(dtype, "cpu")
    return stored_dtype(base_model)


def _reload(kind: Any, folder: Path) -> nn.Module:
    import torch

    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _logits(model: Any, probes: list[torch.Tensor]) -> torch.Tensor:
    """The logits at every position of the probes, one after the other: (positions, outputs).

    A classifier of texts has one position a probe; a decoder is given what its encoder reads.
    """
    import torch

    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for ids in (probe.to(device) for probe in probes):
            both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            logits = model(input_ids=ids, **both).logits
            found.append(logits.reshape(-1, logits.shape[-1]).cpu())
    return torch.cat(found)
