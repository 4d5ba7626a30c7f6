"""A small vision tower, pre-trained on drawn pictures as those of published models are on photos.

It is the vision transformer of Idefics 3 and SmolVLM, small enough for half a minute on a CPU. A
linear classifier teaches it, and is thrown away: the tower tells what pictures show apart, and has
no words for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorakit.demo.shapes import QUESTIONS, SIZE, pictures
from lorakit.progress import track

if TYPE_CHECKING:
    import torch

PATCH = 16
"""Pixels of a side of what is one token of the tower."""

_WIDTH, _LAYERS, _HEADS = 96, 3, 4
STEPS = 600
_PICTURES, _ROWS, _RATE, _WARM_UP = 6000, 64, 2e-3, 50


def tower_config() -> Any:
    """The tower's shape, as transformers' `Idefics3VisionConfig`."""
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return Idefics3VisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_range=0.05,
    )


def pretrained_tower(
    pixels: torch.Tensor, labels: torch.Tensor, seed: int, steps: int = STEPS
) -> torch.nn.Module:
    """The tower after `steps` steps on what `drawn` gives, in float32.

    The classifier reads each patch alone and wants all that the whole picture shows, so that every
    token of the tower carries it. AdamW with a cosine schedule; the same arguments give the same
    tower. Takes about half a minute.
    """
    import torch
    from torch.nn import functional
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        tower = Idefics3VisionTransformer._from_config(tower_config())
        sizes = [len(answers) for answers in QUESTIONS.values()]
        classifier = torch.nn.Linear(_WIDTH, sum(sizes))
        trained = [*tower.parameters(), *classifier.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.05)
        for step in track(range(steps), "pre-training the vision tower", steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP) * cosine
            rows = torch.randint(len(pixels), (_ROWS,))
            features = features_of(tower, pixels[rows])
            logits = classifier(features).flatten(0, 1).split(sizes, dim=1)
            wanted = labels[rows].repeat_interleave(features.shape[1], dim=0)
            losses = [functional.cross_entropy(z, wanted[:, i]) for i, z in enumerate(logits)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    return tower


def features_of(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower makes of pixels (count, 3, side, side) in bytes: (count, patches, width)."""
    import torch

    side = SIZE // PATCH
    everything = torch.ones(len(pixels), side, side, dtype=torch.bool)
    # From bytes to -1 … 1, as the model's image processor does it.
    made = tower(pixels.float() / 127.5 - 1, patch_attention_mask=everything)
    features: torch.Tensor = made.last_hidden_state
    return features


def drawn(seed: int, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures for so many steps of pre-training, 6,000 at most.

    Returns:
        Pixels (count, 3, side, side) as bytes, and the numbers of the right answers (count, 3).
    """
    import numpy as np
    import torch

    count = min(_PICTURES, steps * _ROWS)
    pixels, labels = [], []
    for image, shown in track(pictures(count, seed), "drawing pictures for the tower", count):
        pixels.append(np.asarray(image))
        labels.append(
            [answers.index(a) for answers, a in zip(QUESTIONS.values(), shown, strict=True)]
        )
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes with one thread: for such small products several wait longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
