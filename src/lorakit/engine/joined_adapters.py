"""Which adapters of the pool are in the bank: those that answer, and idle ones while they fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from lorakit.lora.routing import Route

if TYPE_CHECKING:
    from lorakit.engine.pool import Loaded
    from lorakit.lora.model import LoraModel


class JoinedAdapters:
    """The adapters of a bank that answer and are not trained. For the thread that computes.

    Args:
        bank: packed (`LoraModel.pack`).
        most: so many stay in it when they are idle.
    """

    def __init__(self, bank: LoraModel, most: int) -> None:
        self._bank, self._most = bank, most
        self._used: dict[str, None] = {}  # the latest used last

    @torch.inference_mode(False)
    def bring(self, name: str, loaded: Loaded, in_use: Collection[str]) -> None:
        """Has an adapter in the bank, in the place of an idle one if it is full.

        Args:
            in_use: those that must stay.
        """
        if name not in self._bank.peft_config:
            self._bank.routing.route = Route()
            idle = [other for other in self._used if other not in in_use]
            # As many as there are rows find room; the longest unused goes first.
            for other in idle[: max(0, len(self._used) - self._most + 1)]:
                self._bank.delete_adapter(other)
                del self._used[other]
            self._bank.add_packed(name, loaded.config, loaded.parts)
        self._used.pop(name, None)
        self._used[name] = None
