"""What is known of base models' modules, whatever is done with them."""

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), a linear layer stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
