"""Whether a merged model does what base + adapter do: their logits on fixed texts, side by side,
and what of the updates survived the rounding.

Both logits are computed in float32, the merged model's after reading it back from the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.lora import LoraModel
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.load import most_tokens
from lorakit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
class Expected:
    """What base + adapter, and the bare base, say: logits (positions, outputs) of `probes`."""

    probes: list[torch.Tensor]
    adapted: torch.Tensor
    bare: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """How a merged model compares with base + adapter, over the positions of fixed texts.

    Differences are of logits. `adapter_effect` is the largest distance that the adapter moves one
    from the bare base, and `lost_share` the norm of all differences over the norm of all that the
    adapter moves: 0 is a perfect merge, 1 one without the adapter. `kl` is the mean divergence of
    the merged model's distribution from that of base + adapter, in nats a position.
    """

    positions: int
    largest_difference: float
    largest_logit: float
    adapter_effect: float
    lost_share: float
    kl: float
    top1_agreement: float

    def within(self, dtype: str) -> bool:
        """Whether the difference is no more than rounding to `dtype` explains."""
        lost, agreement = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
        same = self.largest_difference <= _NO_DIFFERENCE * self.largest_logit
        return same or (self.lost_share <= lost and self.top1_agreement >= agreement)


def expect(model: LoraModel, tokenizer: PreTrainedTokenizerBase, added_tokens: int = 0) -> Expected:
    """What base + adapter say; `model` has its adapters active and unmerged.

    Args:
        added_tokens: how many of its last tokens the base does not have; they are compared too.
    """
    places = most_tokens(model, 1024)
    probes = [tokenizer(text, return_tensors="pt").input_ids[:, :places] for text in _PROBES]
    if added_tokens:
        rows = vocabulary_size(model.get_base_model())
        probes.append(torch.arange(rows - added_tokens, rows)[None, :places])
    adapted = _logits(model, probes)
    with model.disable_adapter():
        return Expected(probes, adapted, _logits(model, probes))


def compare(expected: Expected, folder: Path, kind: type[nn.Module]) -> Comparison:
    """Loads the merged model in `folder`, of transformers' class `kind`, and compares."""
    load: Any = kind
    merged = load.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    found, wanted, bare = _logits(merged, expected.probes), expected.adapted, expected.bare
    moved = (bare - wanted).norm().clamp(min=torch.finfo(torch.float32).tiny)
    log_p, log_q = (x.double().log_softmax(-1) for x in (wanted, found))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Comparison(
        positions=len(wanted),
        largest_difference=(found - wanted).abs().max().item(),
        largest_logit=wanted.abs().max().item(),
        adapter_effect=(bare - wanted).abs().max().item(),
        lost_share=((found - wanted).norm() / moved).item(),
        kl=max(0.0, kl.item()),
        top1_agreement=(found.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
    )


def _logits(model: Any, probes: list[torch.Tensor]) -> torch.Tensor:
    """The logits at every position of the probes, one after the other: (positions, outputs).

    A classifier of texts has one position a probe; a decoder is given what its encoder reads.
    """
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for ids in (probe.to(device) for probe in track(probes, "comparing texts")):
            both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            logits = model(input_ids=ids, **both).logits
            found.append(logits.reshape(-1, logits.shape[-1]).cpu())
    return torch.cat(found)


class Survival:
    """How much of every module's ΔW is left when the merged weights have been rounded.

    bfloat16 has 8 significant bits: where ΔW is 1% of W, about 83% of it survives.
    """

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, module: str, delta: float, error: float) -> bool:
        """Counts part of a weight: the sums of squares of what was added, and of the error.

        Returns: whether both are finite.
        """
        sums = self._squares.get(module, (0.0, 0.0))
        self._squares[module] = sums[0] + delta, sums[1] + error
        return math.isfinite(error) and math.isfinite(delta)

    @property
    def total(self) -> float:
        """The share of all updates together that survived: 1 where there are none."""
        squares = self._squares.values()
        return _share(math.fsum(d for d, _ in squares), math.fsum(e for _, e in squares))

    @property
    def by_module(self) -> Mapping[str, float]:
        """The share of every module's update that survived, by path."""
        return {module: _share(*squares) for module, squares in self._squares.items()}


def sum_of_squares(values: torch.Tensor) -> float:
    """‖values‖²."""
    flat = values.flatten()
    return torch.dot(flat, flat).item()


def _share(delta: float, error: float) -> float:
    return max(0.0, 1 - math.sqrt(error / delta)) if delta else 1.0
