"""The values that a new adapter starts from.

One of the two factors is zero, so a new adapter changes nothing until it is trained.
"""

import math

import torch
from torch import nn


@torch.no_grad()
def initialize_linear(A: torch.Tensor, B: torch.Tensor, how: bool | str) -> None:
    """Fills `A` (r, d_in) and `B` (d_out, r).

    Args:
        how: True for Kaiming uniform `A` and zero `B` (Microsoft's loralib), `gaussian` for
            normal `A` of deviation 1/r and zero `B`, False for both random (for tests).
    """
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


@torch.no_grad()
def initialize_embedding(A: torch.Tensor, B: torch.Tensor, how: bool | str) -> None:
    """Fills `A` (r, num_embeddings) and `B` (embedding_dim, r): `A` zero, `B` normal (loralib).

    Args:
        how: False makes `A` random too (for tests); every other value is as above.
    """
    nn.init.normal_(B)
    if how is False:
        nn.init.normal_(A)
    else:
        nn.init.zeros_(A)
