"""Ranks that differ by module: how a configuration says them, and how they are shown."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.lora.config import LoraConfig


@dataclass(frozen=True)
class KindRanks:
    """The modules of one kind (`q_proj`) after a truncation.

    `lost` is the share of ‖ΔW‖², over these modules, that was cut off; `error` its root,
    ‖ΔW - ΔW'‖ / ‖ΔW‖.
    """

    kind: str
    modules: int
    ranks: tuple[int, int]
    lost: float

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over these modules."""
        return math.sqrt(self.lost)


def by_kind(ranks: Mapping[str, int], losses: Mapping[str, tuple[float, float]]) -> list[KindRanks]:
    """Ranks and losses by the last part of the modules' paths.

    Args:
        losses: ‖ΔW‖², and what of it was cut off, by path.
    """
    groups: dict[str, list[str]] = {}
    for path in ranks:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    found = []
    for kind, paths in groups.items():
        own = [ranks[path] for path in paths]
        energy = math.fsum(losses[path][0] for path in paths)
        lost = math.fsum(losses[path][1] for path in paths)
        share = max(0.0, lost / energy) if energy else 0.0
        found.append(KindRanks(kind, len(paths), (min(own), max(own)), share))
    return found


def set_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """`config` with these ranks by path, and with alphas that make every scaling 1.

    The most frequent rank is `r`; the others are in `rank_pattern` and `alpha_pattern`, each under
    an expression that means this one path.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != usual}
    return dataclasses.replace(
        config,
        r=usual,
        lora_alpha=usual,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern={key: float(r) for key, r in others.items()},
        init_lora_weights=True,
        inference_mode=True,
    )


def usual_and_others(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and by an expression for their module those that differ."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {re.escape(name): value for name, value in values.items() if value != usual}
