"""Whether a model can be computed row by row with a cache of ours: by its words, and by a proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CAUSAL = {"full_attention", "attention"}


def why_generate_alone(model: PreTrainedModel) -> str:
    """Why only `generate` can compute this model for several rows; empty where it need not."""
    config: Any = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if getattr(model, "_is_stateful", False):
        return "it keeps a state instead of keys and values"
    if other := set(getattr(config, "layer_types", None) or ()) - _CAUSAL:
        return f"it has layers of {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return f"its attention sees {window} tokens at a time"
    return _disproof(model)


@torch.inference_mode()
def _disproof(model: PreTrainedModel) -> str:
    """Computes two short rows in pieces and together, and compares with each computed at once."""
    from lorakit.engine.cache import RowCache
    from lorakit.engine.inputs import newest_tokens, part_of_row, whole_prompts

    config: Any = model.config.get_text_config()
    device = model.device
    forward: Any = model
    cache = RowCache(config.num_hidden_layers, rows=2, length=8)
    rows = [[i % config.vocab_size for i in range(1, 6)], [i % config.vocab_size for i in (7, 9)]]
    try:
        expected = [
            forward(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, -1]
            for row in rows
        ]
        forward(**whole_prompts(cache, 0, [rows[0][:3], rows[1][:1]], device))
        forward(**part_of_row(cache, 0, rows[0][3:4], 3, device))
        lengths = [len(row) - 1 for row in rows]
        found = forward(**newest_tokens(cache, [row[-1] for row in rows], lengths, device))
        logits = found.logits[:, -1]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"it does not take a cache of ours: {type(error).__name__}"
    wanted = torch.stack(expected).float()
    # Rounding differs between the two ways by some steps of the dtype.
    allowed = 64 * torch.finfo(logits.dtype).eps * wanted.abs().max().item()
    if (difference := (logits.float() - wanted).abs().max().item()) <= allowed:
        return ""
    return f"computed in pieces its logits differ by {difference:.3g}"
