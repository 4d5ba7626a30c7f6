"""Random first values: one factor is drawn and the other is zero, or both are drawn (for tests)."""

import math

import torch
from torch import nn

from lorakit.lora.init.initialization import Factors, Initialization, InitSite, register


def kaiming(site: InitSite) -> Factors:
    """Kaiming uniform `A` and zero `B` (Microsoft's loralib)."""
    A = nn.init.kaiming_uniform_(torch.empty_like(site.A), a=math.sqrt(5))
    return Factors(A, torch.zeros_like(site.B))


def gaussian(site: InitSite) -> Factors:
    """A normal `A` of deviation 1/r and zero `B`."""
    return Factors(
        nn.init.normal_(torch.empty_like(site.A), std=1 / site.r), torch.zeros_like(site.B)
    )


def random(site: InitSite) -> Factors:
    """Both random, so that the adapter changes its base from the start: for tests."""
    A = nn.init.kaiming_uniform_(torch.empty_like(site.A), a=math.sqrt(5))
    return Factors(A, nn.init.kaiming_uniform_(torch.empty_like(site.B), a=math.sqrt(5)))


def random_embedding(site: InitSite) -> Factors:
    """Both factors of an embedding normal: for tests."""
    B = nn.init.normal_(torch.empty_like(site.B))
    return Factors(nn.init.normal_(torch.empty_like(site.A)), B)


register(
    Initialization(value=True, make=kaiming, any_shape=True),
    Initialization(value="gaussian", make=gaussian, any_shape=True),
    Initialization(
        value=False,
        make=random,
        embedding=random_embedding,
        bias=nn.init.normal_,
        any_shape=True,
    ),
)
