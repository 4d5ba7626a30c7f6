"""Ranks that differ by module after a truncation, and what of each update was cut off."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from lorakit.lora.combination import Combined


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


class Truncations:
    """Ranks by module's path, and of each module ‖ΔW‖² and what of it was cut off."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self._energies: dict[str, tuple[float, float]] = {}

    def add(self, path: str, found: Combined) -> None:
        """Notes what became of a module's update."""
        self.ranks[path], self._energies[path] = found.A.shape[0], (found.energy, found.lost)

    @property
    def lost(self) -> float:
        """The share of ‖ΔW‖², over all modules, that was cut off."""
        return _share(self._energies.values())

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules."""
        return math.sqrt(self.lost)

    def retained(self) -> dict[str, float]:
        """The share of ‖ΔW‖² that each module keeps, by path."""
        return {path: 1 - _share([one]) for path, one in self._energies.items()}

    def kinds(self) -> list[KindRanks]:
        """Ranks and losses by the last part of the modules' paths."""
        groups: dict[str, list[str]] = {}
        for path in self.ranks:
            groups.setdefault(path.rpartition(".")[2], []).append(path)
        found = []
        for kind, paths in groups.items():
            own = [self.ranks[path] for path in paths]
            lost = _share([self._energies[path] for path in paths])
            found.append(KindRanks(kind, len(paths), (min(own), max(own)), lost))
        return found


def _share(energies: Collection[tuple[float, float]]) -> float:
    total, lost = (math.fsum(column) for column in zip(*energies, strict=True))
    return max(0.0, lost / total) if total else 0.0
