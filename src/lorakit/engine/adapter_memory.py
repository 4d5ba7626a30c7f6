"""Adapters in training within a bound of memory: the least recently used wait on disk.

An adapter that rests has left the resident model with everything that belongs to it: its values,
the gradients that it has accumulated, its optimizer's state and its dropout's random numbers. It
comes back bit for bit when it is used. All of it is for the thread that computes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorakit import atomic
from lorakit.engine.resident import ResidentModel
from lorakit.errors import LorakitError
from lorakit.lora.config import LoraConfig

COPIES = 4
"""What an adapter in training has of each parameter: value, gradient and Adam's two moments."""
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_log = logging.getLogger("lorakit.training")


@dataclass(frozen=True)
class _Resting:
    config: LoraConfig
    path: Path
    size: int


class AdapterMemory:
    """The adapters of a resident model that are trained.

    Args:
        folder: where those are that rest; it is this object's alone.
        limit: bytes that adapters may take in memory, gradients and optimizer state included.

    Attributes:
        rests: how often an adapter has left the memory.
    """

    def __init__(self, resident: ResidentModel, folder: Path, limit: int) -> None:
        self._resident, self._folder, self._limit = resident, folder, limit
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._resting: dict[str, _Resting] = {}
        self.rests = 0

    @property
    def in_memory(self) -> int:
        """How many adapters are in memory."""
        return len(self._sizes)

    @property
    def on_disk(self) -> int:
        """How many rest."""
        return len(self._resting)

    @property
    def bytes(self) -> int:
        """What those in memory take."""
        return sum(list(self._sizes.values()))

    def added(self, name: str) -> None:
        """An adapter has been created or loaded; others make room for it."""
        tensors = self._resident.trained(name).values()
        self._sizes[name] = COPIES * sum(t.numel() * t.element_size() for t in tensors)
        self._sizes.move_to_end(name)
        self._make_room(0, {name})

    def fitting(self, names: Iterable[str]) -> list[str]:
        """As many of these, in their order, as fit into the memory together; at least the first."""
        found: list[str] = []
        total = 0
        for name in names:
            size = self._size(name)
            if not found or total + size <= self._limit:
                found.append(name)
                total += size
        return found

    def bring(self, name: str, beside: Collection[str] = ()) -> None:
        """Has an adapter in memory; unknown names are nobody's concern here.

        Args:
            beside: adapters that must stay in memory.

        Raises:
            LorakitError: it cannot be read back.
        """
        if (resting := self._resting.get(name)) is not None:
            self._make_room(resting.size, {name, *beside})
            self._wake(name, resting)
        if name in self._sizes:
            self._sizes.move_to_end(name)

    def replace(self, name: str, load: Callable[[], None]) -> None:
        """Has `load` add another adapter of this name; where it fails, the old one is back.

        Raises:
            LorakitError: the old one cannot be kept meanwhile.
        """
        if name not in self._resting:
            self._rest(name)
        resting = self._resting.pop(name)
        try:
            load()
        except BaseException:
            if name in self._resident.adapters:
                self._resident.remove(name)
            self._wake(name, resting)
            raise
        resting.path.unlink(missing_ok=True)
        self.added(name)

    def remove(self, name: str) -> None:
        """Forgets an adapter, in the resident model too."""
        if (resting := self._resting.pop(name, None)) is not None:
            resting.path.unlink(missing_ok=True)
            return
        self._sizes.pop(name, None)
        self._resident.remove(name)

    def _size(self, name: str) -> int:
        resting = self._resting.get(name)
        return self._sizes.get(name, 0) if resting is None else resting.size

    def _make_room(self, size: int, stay: Collection[str]) -> None:
        for name in [other for other in self._sizes if other not in stay]:
            if self.bytes + size <= self._limit:
                return
            try:
                self._rest(name)
            except LorakitError as error:  # more memory than was meant, and nothing is lost
                _log.warning("an adapter stays in memory: %s", error)
                return

    def _rest(self, name: str) -> None:
        resident = self._resident
        tensors = {f"stream:{k}": state for k, state in resident.stream(name).states().items()}
        optimizer = resident.optimizer(name)
        for key, parameter in resident.trained(name).items():
            tensors[f"value:{key}"] = parameter.detach()
            if parameter.grad is not None:
                tensors[f"grad:{key}"] = parameter.grad
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            tensors |= {f"adam:{w}:{key}": torch.as_tensor(state[w]) for w in _ADAM if w in state}
        path = self._folder / f"{name}.safetensors"
        with atomic.replacing_file(path) as temporary:
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, temporary)
        self._resting[name] = _Resting(resident.model.peft_config[name], path, self._sizes[name])
        del self._sizes[name]
        resident.remove(name)
        self.rests += 1

    def _wake(self, name: str, resting: _Resting) -> None:
        resident = self._resident
        try:
            tensors = {key: t.clone() for key, t in load_file(resting.path).items()}
        except Exception as error:
            raise LorakitError(f"an idle adapter cannot be read back from disk: {error}") from error
        resident.create(name, resting.config)
        states = {k.partition(":")[2]: t for k, t in tensors.items() if k.startswith("stream:")}
        resident.stream(name).restore(states)
        with torch.no_grad():
            for key, parameter in resident.trained(name).items():
                parameter.data = tensors[f"value:{key}"].to(parameter.device)
                grad = tensors.get(f"grad:{key}")
                parameter.grad = None if grad is None else grad.to(parameter.device)
                for what in _ADAM:
                    value = tensors.get(f"adam:{what}:{key}")
                    if value is not None:
                        resident.made_optimizer(name).state[parameter][what] = value.to(
                            parameter.device
                        )
        self._sizes[name] = resting.size
        self._resting.pop(name, None)
        resting.path.unlink(missing_ok=True)
