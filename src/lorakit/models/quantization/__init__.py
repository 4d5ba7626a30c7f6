"""Quantised base models: one file a backend, and one line here.

A backend says how it is asked for, how transformers loads it, and how its weights are unpacked.
This module is imported with lorakit itself, so that neither it nor a backend imports torch.
"""

from lorakit.models.quantization.awq import AWQ
from lorakit.models.quantization.bitsandbytes import EightBits, FourBits
from lorakit.models.quantization.compressed_tensors import CompressedTensors
from lorakit.models.quantization.fp8 import FP8, FbgemmFP8
from lorakit.models.quantization.gptq import GPTQ
from lorakit.models.quantization.modelopt import ModelOpt
from lorakit.models.quantization.mxfp4 import MXFP4
from lorakit.models.quantization.rounded_weights import RoundedWeights
from lorakit.models.quantization.torchao import TorchAO
from lorakit.weight_formats import register

register(TorchAO())
register(GPTQ())
register(AWQ())
register(FP8())
register(FbgemmFP8())
register(MXFP4())
register(CompressedTensors())
register(ModelOpt())
register(EightBits())
register(FourBits())
register(RoundedWeights("int8"))
register(RoundedWeights("int4"))
