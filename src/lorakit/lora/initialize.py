"""The values that a new adapter starts from, as `LoraConfig.init_lora_weights` names them.

A new adapter changes nothing until it is trained: one of its factors is zero, or what both
factors make is taken off again (`InitialFactors`).
"""

import math

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.initial_settings import LoftQConfig, as_settings

START = "lora_start"
"""The attribute of a base layer under which `prepare.py` leaves factors for the next adapter."""


class InitialFactors(nn.Module):
    """The factors that an adapter started from, where they are not zero: `A` and `B`, frozen.

    PiSSA and OLoRA start from a part of `W` itself and train against the rest of it. Here the
    rest is never formed: `W` stays as it is and the layer computes `W + s (B A - B0 A0)`, so that
    other adapters, unloading and merging see the base's own weight.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A.detach().clone())
        self.register_buffer("B", B.detach().clone())


@torch.no_grad()
def initialize(
    A: torch.Tensor,
    B: torch.Tensor,
    W: torch.Tensor,
    scaling: float,
    config: LoraConfig,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> InitialFactors | None:
    """Fills the factors of a linear or convolution layer.

    `True` is Kaiming uniform `A` and zero `B` (Microsoft's loralib), `gaussian` a normal `A` of
    deviation 1/r and zero `B`, False both random (for tests).

    Shapes: A (r, d_in, …), B (d_out, r, …), W (d_out, d_in).
    Args:
        start: the factors that were made from data (`prepare.py`).
    Returns: what has to be taken off again, None when there is nothing.
    """
    how = config.init_lora_weights
    if how in ("corda", "lora_ga"):
        if start is None:
            raise InputError(
                f"init_lora_weights='{how}' needs data: call "
                f"{'preprocess_corda' if how == 'corda' else 'preprocess_loraga'} first"
            )
        A.copy_(start[0])
        B.copy_(start[1])
        return InitialFactors(A, B)
    if isinstance(how, str) and how not in ("gaussian", "eva"):
        return _decompose(A, B, W, scaling, how)
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)
    return None


@torch.no_grad()
def initialize_loftq(
    A: torch.Tensor, B: torch.Tensor, W: torch.Tensor, scaling: float, config: LoraConfig
) -> torch.Tensor:
    """Fills the factors with what quantising `W` loses, and returns `W` quantised (d_out, d_in)."""
    from lorakit.lora import decomposition

    settings = as_settings(LoftQConfig, "loftq_config", config.loftq_config)
    quantized, new_A, new_B = decomposition.loftq(
        W, A.shape[0], settings.loftq_bits, settings.loftq_iter, scaling
    )
    A.copy_(new_A)
    B.copy_(new_B)
    return quantized


@torch.no_grad()
def initialize_bias(bias: torch.Tensor, how: bool | str) -> None:
    """Fills the bias of `B` (d_out,): zero, or random with `how` False (for tests)."""
    if how is False:
        nn.init.normal_(bias)
    else:
        nn.init.zeros_(bias)


def _decompose(
    A: torch.Tensor, B: torch.Tensor, W: torch.Tensor, scaling: float, how: str
) -> InitialFactors | None:
    """Fills the factors from the weight itself; see `decomposition.py`."""
    from lorakit.lora import decomposition

    r = A.shape[0]
    if how == "orthogonal":
        new_A, new_B = decomposition.orthogonal(W.shape[1], W.shape[0], r)
    elif how == "mica":
        new_A, new_B = decomposition.mica(W, r)
    elif how == "olora":
        new_A, new_B = decomposition.olora(W, r, scaling)
    else:
        niter = int(how.removeprefix("pissa_niter_")) if how != "pissa" else None
        new_A, new_B = decomposition.pissa(W, r, scaling, niter)
    A.copy_(new_A)
    B.copy_(new_B)
    # Orthogonal halves have a product of zero, as MiCA's zero A, and with it nothing to take off.
    return None if how in ("orthogonal", "mica") else InitialFactors(A, B)


@torch.no_grad()
def initialize_embedding(
    A: torch.Tensor, B: torch.Tensor, W: torch.Tensor, how: bool | str
) -> None:
    """Fills `A` (r, num_embeddings) and `B` (embedding_dim, r): `A` zero, `B` normal (loralib).

    Args:
        W: the embedding's weight, transposed.
        how: False makes `A` random too (for tests), `mica` takes `B` from the weight; every other
            value is as above.
    """
    if how == "mica":
        _decompose(A, B, W, 1.0, how)
        return
    nn.init.normal_(B)
    if how is False:
        nn.init.normal_(A)
    else:
        nn.init.zeros_(A)
