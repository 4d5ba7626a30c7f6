"""Cross-entropy behind a frozen output layer, without ever holding all logits.

With a vocabulary of 50,000 and more the logits are the largest tensors of a training step, and
autograd keeps several copies. Here a chunk of positions at a time becomes logits, loss and the
gradient of the hidden states, and only the last is kept (the idea of Liger Kernel's fused linear
cross-entropy, Hsu et al. 2024, arXiv:2410.10989).
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**23
"""Logits held at a time, where all that is made of them lies beside them: 32 MB in float32."""

CACHED_ELEMENTS = 2**18
"""Those that become a loss and gradients at a time on a CPU, so that its caches hold them."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """The cross-entropy, in nats, of `post(h W^T + b)` for the target classes.

    `post(z)` is `scale * z`, then `softcap * tanh(z / softcap)` if there is a softcap, then
    divided by `temperature`, in float32 or wider.
    Shapes: h (n, d), W (V, d), b (V,) or None, targets (n,), smoothing (n,) or None. Returns (n,),
    in float32 or wider. With smoothing e a target is (1 - e) of its class and e / V of each.
    With `entropies` it returns the entropy (n,) of each distribution too; gradients go through it
    with `learned`: dH/dz = p (sum p z - z), a second product with W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        smoothing: torch.Tensor | None,
        temperature: float,
        entropies: bool,
        learned: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.empty(len(h), dtype=wide, device=h.device)
        found = torch.empty_like(losses) if entropies else None
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        of_entropy = torch.empty_like(h) if learned and dh is not None else None

        def through(grad: torch.Tensor, capped: torch.Tensor | None) -> torch.Tensor:
            """The gradient of `h W^T + b` by that of the logits, which it changes."""
            if temperature != 1:
                grad /= temperature
            if capped is not None:
                grad *= 1 - capped.to(wide).square_()
            if scale != 1:
                grad *= scale
            return grad

        n, held, cached = len(h), CHUNK_ELEMENTS, CHUNK_ELEMENTS
        if h.device.type == "cpu":  # nothing as large lies beside the logits, in their own dtype
            held, cached = held * 8 // h.element_size(), CACHED_ELEMENTS
        most, few = max(1, held // W.shape[0]), max(1, cached // W.shape[0])
        # Chunks of one size, as each reads all of W: none for a few rows that are left.
        rows = -(-n // -(-n // most)) if n else 1
        for at in range(0, n, rows):
            chunk = torch.nn.functional.linear(h[at : at + rows], W, b)
            spread = None if of_entropy is None else torch.empty_like(chunk)
            for first in range(0, len(chunk), few):
                computed = chunk[first : first + few]
                own = slice(at + first, at + first + len(computed))
                logits = computed if scale == 1 else computed * scale
                capped = None
                if softcap is not None:
                    capped = torch.tanh(logits / softcap)
                    logits = capped * softcap
                if temperature != 1:
                    logits = logits.to(wide) / temperature
                chosen = targets[own, None]
                # -log p = log sum exp(z) - z, whose first term is max z - log max p: with softmax
                # the gradient is there too, in half the time of a log-softmax and its exponential.
                grad = torch.softmax(logits, dim=-1, dtype=wide)
                largest = logits.amax(-1, keepdim=True).to(wide)
                log_sums = largest - grad.amax(-1, keepdim=True).log_()
                if found is not None:  # log sum exp(z) - sum p z
                    mean = (grad * logits).sum(-1, keepdim=True)
                    found[own] = (log_sums - mean).squeeze(1)
                    if spread is not None:
                        spread[first : first + few] = through(grad * (mean - logits), capped)
                wanted = logits.gather(1, chosen).to(wide)
                certain = grad.new_ones(chosen.shape)
                if smoothing is not None:
                    even = smoothing[own, None]
                    certain -= even
                    mean = logits.mean(-1, keepdim=True, dtype=wide)
                    wanted = certain * wanted + even * mean
                    grad -= even / logits.shape[1]
                losses[own] = (log_sums - wanted).squeeze(1)
                if dh is not None:
                    grad.scatter_add_(1, chosen, -certain)
                    # Of these logits nothing else is needed from here on.
                    computed.copy_(through(grad, capped))
            if dh is not None:
                dh[at : at + rows] = chunk.to(h.dtype) @ W
            if of_entropy is not None and spread is not None:
                of_entropy[at : at + rows] = spread.to(h.dtype) @ W
        ctx.save_for_backward(dh, of_entropy)
        if found is None:
            return losses
        if of_entropy is None:
            ctx.mark_non_differentiable(found)
        return losses, found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor, entropies: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        dh, of_entropy = ctx.saved_tensors
        found = dh * grad[:, None].to(dh.dtype)
        if of_entropy is not None and entropies is not None:
            found += of_entropy * entropies[:, None].to(dh.dtype)
        return found, *(None,) * 9


def chunked_cross_entropy(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    smoothing: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy of each position with hidden states `h`, for a frozen `W` and `b`.

    Shapes as in `ChunkedCrossEntropy`. Gradients reach `h` alone.
    """
    return ChunkedCrossEntropy.apply(
        h, W, b, targets, scale, softcap, smoothing, temperature, False, False
    )


def cross_entropy_and_entropy(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    learned: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked_cross_entropy`, and the entropy (n,) of each distribution.

    Args:
        learned: gradients go through the entropies too.
    """
    found: tuple[torch.Tensor, torch.Tensor] = ChunkedCrossEntropy.apply(
        h, W, b, targets, scale, softcap, None, temperature, True, learned
    )
    return found
