"""ChatGLM's forward pass in plain tensor arithmetic, under the names of the original files.

Written from the published architecture (https://github.com/THUDM/ChatGLM2-6B, arXiv 2406.12793), to
compare others with; it shares nothing with transformers. A rotation is a product of complex
numbers here, and heads are looped over.
"""

import math
from typing import Any

import torch

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class PlainChatGLM:
    """The model of a `config.json` and the tensors of its files, in float32."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Logits (batch, tokens, vocabulary) of `ids` (batch, tokens), and keys and values so far.

        mask: (batch, all tokens so far), 0 where a token is padding.
        """
        before = 0 if cache is None else cache[0][0].shape[1]
        batch, new = ids.shape
        if positions is None:
            positions = torch.arange(before, before + new).expand(batch, new)
        if mask is None:
            mask = torch.ones(batch, before + new)
        order = torch.arange(before + new)
        seen = (order[None] <= order[before:, None])[None] & mask.bool()[:, None]
        x = self._weight("transformer.embedding.word_embeddings")[ids]
        kept: Cache = []
        for layer in range(self.config["num_layers"]):
            path = f"transformer.encoder.layers.{layer}"
            past = None if cache is None else cache[layer]
            out, keys = self._attend(
                path, self._norm(f"{path}.input_layernorm", x), seen, positions, past
            )
            kept.append(keys)
            x = x + out
            x = x + self._feed(path, self._norm(f"{path}.post_attention_layernorm", x))
        x = self._norm("transformer.encoder.final_layernorm", x)
        return x @ self._weight("transformer.output_layer").T, kept

    def _weight(self, path: str) -> torch.Tensor:
        return self.tensors[f"{path}.weight"]

    def _norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        size = x.pow(2).mean(-1, keepdim=True)
        return x / (size + self.config["layernorm_epsilon"]).sqrt() * self._weight(path)

    def _attend(
        self,
        path: str,
        x: torch.Tensor,
        seen: torch.Tensor,
        positions: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        c = self.config
        heads, groups, d = c["num_attention_heads"], c["multi_query_group_num"], c["kv_channels"]
        mixed = x @ self._weight(f"{path}.self_attention.query_key_value").T
        if c["add_qkv_bias"]:
            mixed = mixed + self.tensors[f"{path}.self_attention.query_key_value.bias"]
        pieces = mixed.unflatten(-1, (heads + 2 * groups, d))
        q, k, v = pieces.split([heads, groups, groups], dim=2)
        q, k = self._turn(q, positions), self._turn(k, positions)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(d)
            scores = scores.masked_fill(~seen, -1e30).softmax(-1)
            outputs.append(scores @ v[:, :, group])
        out = torch.cat(outputs, -1) @ self._weight(f"{path}.self_attention.dense").T
        return out, (k, v)

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turns the pairs of neighbours in the first half of every head: (batch, t, heads, d)."""
        half = self.config["kv_channels"] // 2
        base, ratio = 10000.0, self.config.get("rope_ratio", 1)
        if self.config.get("stretched"):
            positions = positions / ratio
        else:
            base *= ratio
        speeds = base ** (-torch.arange(0, half, 2).double() / half)
        angles = positions.double()[..., None] * speeds
        turns = torch.polar(torch.ones_like(angles), angles)[:, :, None]
        pairs = torch.view_as_complex(x[..., :half].double().unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turns).flatten(-2).to(x)
        return torch.cat([turned, x[..., half:]], -1)

    def _feed(self, path: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self._weight(f"{path}.mlp.dense_h_to_4h").T).chunk(2, -1)
        return (gate * gate.sigmoid() * up) @ self._weight(f"{path}.mlp.dense_4h_to_h").T
