"""Random numbers that an adapter draws for itself, whoever is trained beside it.

PyTorch's dropout draws from one generator a device. Where adapters share a batch, each brings the
state in which that generator would be if it were alone, and gets it back when it has drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stream:
    """The states of PyTorch's generators, of the CPU and of one device, for one adapter.

    A new one takes over the states that the generators are in now.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators: dict[str, torch.Generator] = {"cpu": torch.default_generator}
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators["cuda"] = torch.cuda.default_generators[index]
        self._states = {kind: g.get_state() for kind, g in self._generators.items()}

    def copy(self) -> Stream:
        """A stream that gives the same numbers from here on, and leaves this one where it is."""
        other = object.__new__(Stream)
        other._generators, other._states = self._generators, dict(self._states)
        return other

    def states(self) -> dict[str, torch.Tensor]:
        """Where it is, by kind of device."""
        return dict(self._states)

    def restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Goes to where `states` was taken."""
        self._states = {kind: states[kind] for kind in self._generators}

    @contextmanager
    def drawing(self, device: torch.device | None = None) -> Iterator[None]:
        """Within this block PyTorch draws from this stream, and afterwards from where it was.

        Args:
            device: only what is drawn there; None is everywhere.
        """
        kinds = list(self._generators) if device is None else [device.type]
        before = {kind: self._generators[kind].get_state() for kind in kinds}
        for kind in kinds:
            self._generators[kind].set_state(self._states[kind])
        try:
            yield
        finally:
            for kind in kinds:
                self._states[kind] = self._generators[kind].get_state()
                self._generators[kind].set_state(before[kind])
