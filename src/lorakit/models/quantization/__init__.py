"""Quantised base models: one file a backend, and one line here.

A backend says how it is asked for, how transformers loads it, and how its weights are unpacked.
This module is imported with lorakit itself, so that neither it nor a backend imports torch.
"""

from lorakit.models.quantization.bitsandbytes import EightBits, FourBits
from lorakit.models.quantization.torchao import TorchAO
from lorakit.weight_formats import register

register(TorchAO())
register(EightBits())
register(FourBits())
