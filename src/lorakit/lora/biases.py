"""The base's own biases, where an adapter trains them (`bias="all"` or `"lora_only"`).

They are part of the base, so that there is one set of them for one adapter. This keeps the
values that they had before, so that the base can be had without the adapter again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class TrainedBiases:
    """Biases in two versions, as they were and as they are trained; one is in force."""

    def __init__(self, biases: Iterable[torch.Tensor]) -> None:
        self.biases = list(biases)
        self._others = [bias.detach().clone() for bias in self.biases]
        self.in_force = True

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each bias as it was, and as it is trained, which must be in force."""
        return zip(self._others, self.biases, strict=True)

    @contextmanager
    def using(self, trained: bool) -> Iterator[None]:
        """`use` for the duration of a block."""
        before = self.in_force
        self.use(trained)
        try:
            yield
        finally:
            self.use(before)

    def use(self, trained: bool) -> None:
        """Puts the trained values, or those from before, in force; the others are kept."""
        if trained == self.in_force:
            return
        self.in_force = trained
        for i, bias in enumerate(self.biases):
            # Through `data`: autograd must not take it for a change of what it has saved.
            self._others[i], bias.data = bias.detach(), self._others[i].to(bias)
