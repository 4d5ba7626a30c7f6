"""Which adapters of the pool are in the bank: those that answer, and idle ones while they fit.

The first adapter of a layer, and one that needs more columns than there are, has weights laid out
anew. Beside answers that are written this is done in parts, so that they have their next tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch

from lorakit.lora.joining import packed_paths
from lorakit.lora.routing import Route

if TYPE_CHECKING:
    from lorakit.engine.adapter_reader import Loaded
    from lorakit.lora.model import LoraModel

PARTS = 16
"""Of the base, one is laid out anew in a step of answers: about a third of the step's own time."""


class JoinedAdapters:
    """The adapters of a bank that answer and are not trained. For the thread that computes.

    Args:
        bank: packed (`LoraModel.pack`).
        most: so many stay in it when they are idle.
    """

    def __init__(self, bank: LoraModel, most: int) -> None:
        self._bank, self._most = bank, most
        self._used: dict[str, None] = {}  # the latest used last
        base = sum(p.nbytes for p in bank.get_base_model().parameters())
        self._part, self._left = base // PARTS, 0
        self._under_way: tuple[str, Iterator[int]] = "", iter(())

    def begin_step(self) -> None:
        """Another step of answers begins, beside which another part may be done."""
        self._left = self._part

    def bring(self, name: str, loaded: Loaded, in_use: Collection[str]) -> None:
        """Has an adapter in the bank, in the place of an idle one if it is full.

        Args:
            in_use: those that must stay.
        """
        while not self.bring_on(name, loaded, in_use):
            self.begin_step()

    @torch.inference_mode(False)
    def bring_on(self, name: str, loaded: Loaded, in_use: Collection[str]) -> bool:
        """Goes on with `bring`, as far as the step allows.

        Returns: whether the adapter is in the bank.
        """
        if name not in self._bank.peft_config:
            if self._under_way[0] != name:
                self._under_way = name, self._brought(name, loaded, in_use)
            while self._left > 0:
                size = next(self._under_way[1], None)
                if size is None:
                    self._under_way = "", iter(())
                    break
                self._left -= size
            if name not in self._bank.peft_config:
                return False
        self._used.pop(name, None)
        self._used[name] = None
        return True

    def _brought(self, name: str, loaded: Loaded, in_use: Collection[str]) -> Iterator[int]:
        """Brings an adapter; yields how many bytes each part of that has laid out."""
        bank = self._bank
        bank.routing.route = Route()
        idle = [other for other in self._used if other not in in_use]
        # As many as there are rows find room; the longest unused goes first.
        for other in idle[: max(0, len(self._used) - self._most + 1)]:
            bank.delete_adapter(other)
            del self._used[other]
        assert bank.packed is not None
        yield from bank.packed.make_room(packed_paths(loaded.parts), loaded.rank)
        bank.routing.route = Route()
        bank.add_packed(name, loaded.config, loaded.parts)
        yield loaded.size
