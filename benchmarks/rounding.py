"""What `--weights` costs in accuracy: perplexity, equal top tokens and KL divergence on a text.

The bundled model beside itself with rounded weights. Its file has 4 bits in groups of 32 itself
(GGUF Q4_1), in which `int4` finds every number again. What `int4` costs a model that was not
rounded before is told by "other groups": the inputs of each layer are grouped in a random order.

    python -m benchmarks.rounding --text FILE [--tokens 6144] [--window 512] [--orders 2]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div

import lorakit
from lorakit.models.bundled import ALIAS
from lorakit.models.quantization.int4_weight import Int4Weight
from lorakit.models.quantization.int8_weight import Int8Weight

Rounding = Callable[[torch.Tensor], torch.Tensor]


def in_8_bits(W: torch.Tensor) -> torch.Tensor:
    return Int8Weight.of(W).unpacked(W.dtype)


def in_4_bits(W: torch.Tensor) -> torch.Tensor:
    return Int4Weight.of(W).unpacked(W.dtype)


def in_other_groups(W: torch.Tensor, seed: int) -> torch.Tensor:
    """`W` (d_out, d_in) in 4 bits, whose groups are inputs of a random order."""
    order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(W)
    found[:, order] = in_4_bits(W[:, order])
    return found


class Rounded:
    """A model whose linear layers are rounded for a while, by what the weights stand for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._whole = {
            module: module.weight
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not model.lm_head
        }
        self._head = model.lm_head.weight

    @torch.no_grad()
    def set(self, layers: Rounding | None, head: Rounding | None) -> None:
        """None is as they are."""
        for module, weight in [*self._whole.items(), (self.model.lm_head, self._head)]:
            how = head if module is self.model.lm_head else layers
            module.weight = weight if how is None else nn.Parameter(how(weight.data), False)

    @torch.inference_mode()
    def log_probabilities(self, windows: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Of each window (tokens,): (tokens - 1, vocabulary)."""
        for window in windows:
            logits = self.model(input_ids=window[None]).logits[0, :-1]
            yield logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--orders", type=int, default=2, help="how many orders of inputs to try")
    args = parser.parse_args()
    model, tokenizer = lorakit.load_model(ALIAS, "bfloat16")
    ids = tokenizer(args.text.read_text("utf-8")[: 8 * args.tokens]).input_ids[: args.tokens]
    windows = [torch.tensor(ids[i : i + args.window]) for i in range(0, len(ids), args.window)]
    labels = torch.cat([window[1:] for window in windows])
    rounded = Rounded(model.eval())
    plain = torch.cat([*rounded.log_probabilities(windows)])

    def measured() -> dict[str, float]:
        found = torch.cat([*rounded.log_probabilities(windows)])
        losses = -found.gather(1, labels[:, None])
        same = (found.argmax(-1) == plain.argmax(-1)).float().mean()
        divergence = kl_div(found, plain, log_target=True, reduction="sum")
        return {
            "perplexity": round(losses.mean().exp().item(), 2),
            "equal top tokens, %": round(100 * same.item(), 1),
            "KL divergence, nats": round(divergence.item() / len(labels), 4),
        }

    sides: dict[str, tuple[Rounding | None, Rounding | None]] = {
        "bfloat16": (None, None),
        "int8": (in_8_bits, in_8_bits),
        "int4": (in_4_bits, in_8_bits),
        "int4, the output layer too": (in_4_bits, in_4_bits),
    }
    for seed in range(args.orders):
        sides[f"int4, other groups {seed}"] = partial(in_other_groups, seed=seed), in_8_bits
    results = {}
    print("| weights | perplexity | equal top tokens | KL divergence |\n| --- | --- | --- | --- |")
    for name, (layers, head) in sides.items():
        rounded.set(layers, head)
        results[name] = measured()
        perplexity, same, divergence = results[name].values()
        print(f"| {name} | {perplexity} | {same} % | {divergence} |", flush=True)
    print(json.dumps({"tokens": len(ids), "window": args.window, **results}))


if __name__ == "__main__":
    main()
