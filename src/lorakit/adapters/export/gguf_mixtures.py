"""In which form each tensor of a GGUF model is written, for the mixtures that llama.cpp names.

The choices are those of llama.cpp's `llama-quantize` without an importance matrix
(`src/llama-quant.cpp`): `q4_k_m` and `q5_k_m` give more bits to the head, and to the values and the
feed-forward outputs of every third layer and of those at both ends.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import gguf

_T = gguf.GGMLQuantizationType
_NARROWER = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
"""What takes the place of forms of 256 values where rows are no multiple of it."""
_NOT_ROUNDED = (
    *("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight"),
    *("ffn_gate_inp_shexp.weight", "exps.bias"),
    *("ssm_a", "ssm_d", "ssm_conv1d.weight", "ssm_norm.weight", "shortconv.conv.weight"),
)
_MORE = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down|ffn_down_exps|ffn_down_shexp)\.weight")


@dataclass(frozen=True)
class Mixture:
    """A word of `--dtype`: the form of most weights, and of those that get more bits.

    Attributes:
        name: llama.cpp's, in capitals; `file_type` is what the file says of itself.
        more: for values and feed-forward outputs of some layers; None for none.
        qkv: for queries, keys and values in one weight.
        head: for the output layer, or the embedding that is one with it.
    """

    name: str
    usual: gguf.GGMLQuantizationType
    more: gguf.GGMLQuantizationType | None = None
    qkv: gguf.GGMLQuantizationType | None = None
    head: gguf.GGMLQuantizationType | None = None

    @property
    def file_type(self) -> gguf.LlamaFileType:
        """What the file says of itself."""
        kind = "ALL" if self.usual == _T.F32 else "MOSTLY"
        return gguf.LlamaFileType[f"{kind}_{self.name}"]

    @property
    def rounds(self) -> bool:
        """Whether weights take less than 16 bits."""
        return self.usual not in (_T.F32, _T.F16, _T.BF16)


MIXTURES = {
    "float32": Mixture("F32", _T.F32),
    "float16": Mixture("F16", _T.F16),
    "bfloat16": Mixture("BF16", _T.BF16),
    "q8_0": Mixture("Q8_0", _T.Q8_0),
    "q6_k": Mixture("Q6_K", _T.Q6_K),
    "q5_k_m": Mixture("Q5_K_M", _T.Q5_K, more=_T.Q6_K, qkv=_T.Q6_K, head=_T.Q6_K),
    "q4_k_m": Mixture("Q4_K_M", _T.Q4_K, more=_T.Q6_K, qkv=_T.Q5_K, head=_T.Q6_K),
    "q4_0": Mixture("Q4_0", _T.Q4_0, head=_T.Q6_K),
}
"""By the words of `--dtype`."""


@dataclass
class Forms:
    """The forms of a model's tensors, and how often a row did not fit the one that was meant.

    Args:
        layers: how many the model has.
        tied: whether the embedding is the output layer too.
    """

    mixture: Mixture
    layers: int
    tied: bool
    fallen: Counter[str] = field(default_factory=Counter)
    seen: int = 0

    def of(self, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        """The form in which the tensor `name` of llama.cpp is written.

        llama.cpp computes in float32 only with vectors, positions, the routers of experts, and what
        mixers have beside linear layers.
        """
        if len(shape) < 2 or name.endswith(_NOT_ROUNDED):
            return _T.F32
        wanted = form = self._wanted(name)
        if shape[-1] % gguf.GGML_QUANT_SIZES[form][0]:
            form = _NARROWER.get(form, _T.F16)
        if shape[-1] % gguf.GGML_QUANT_SIZES[form][0]:
            form = _T.F16
        self.seen += 1
        if form != wanted:
            self.fallen[form.name] += 1
        return form

    def _wanted(self, name: str) -> gguf.GGMLQuantizationType:
        mixture = self.mixture
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return mixture.head or mixture.usual
        if mixture.qkv and name.endswith("attn_qkv.weight"):
            return mixture.qkv
        found = _MORE.fullmatch(name)
        if mixture.more and found and _more_bits(int(found[1]), self.layers):
            return mixture.more
        return mixture.usual

    def notices(self) -> list[str]:
        """What was written in another form than the mixture's."""
        if not self.fallen:
            return []
        size = gguf.GGML_QUANT_SIZES[self.mixture.usual][0]
        size = max(size, 256 if self.mixture.head else size)
        others = ", ".join(f"{count} as {form}" for form, count in self.fallen.most_common())
        return [
            f"rows of {sum(self.fallen.values())} of {self.seen} weights are not a multiple of "
            f"{size} values, which {self.mixture.name} needs: written {others}, as llama.cpp does"
        ]


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def byte_shape(
    shape: tuple[int, ...], form: gguf.GGMLQuantizationType
) -> tuple[tuple[int, ...], int]:
    """The shape in bytes of a tensor in `form`, and their number."""
    stored = gguf.quant_shape_to_byte_shape(shape, form)
    return stored, math.prod(stored)
