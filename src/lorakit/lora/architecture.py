"""Facts about base models: their embeddings, heads, attention and experts, without adapters."""

from typing import Any

from torch import nn

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), a linear layer stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def without_wrappers(name: str) -> str:
    """The path of a module or parameter without the parts that wrappers have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding that reads tokens, None where the model does not say."""
    return _asked(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, None where the model does not say."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def language_part(model: nn.Module) -> str | None:
    """The path of the language model in a model for pictures or sound too; None in all others."""
    config: Any = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    get_decoder = getattr(model, "get_decoder", None)
    if get_text is None or get_decoder is None:
        return None
    try:
        if get_text() is config:
            return None
    except ValueError:  # an encoder and a decoder, both for text
        return None
    decoder = get_decoder()
    found = (name for name, module in model.named_modules() if module is decoder)
    path = without_wrappers(next(found, ""))
    speaks = output_head(model) is not None or path.rpartition(".")[2] == "language_model"
    return path if path and speaks else None


def expert_parameters(model: nn.Module) -> list[str]:
    """The paths of the stacked weights (experts, …, …) of a mixture's experts."""
    return [
        name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name.lower()
    ]


def mixes_tokens(module: nn.Module) -> bool:
    """Whether this is a token mixer without attention: a state space, a delta rule, a convolution.

    Mamba, Gated DeltaNet (Qwen 3.5) and short convolutions (LFM2) have a decay of their state or a
    convolution along the tokens beside their projections.
    """
    has_decay = isinstance(getattr(module, "A_log", None), nn.Parameter)
    return has_decay or any(isinstance(child, nn.Conv1d) for child in module.children())


def is_read(convolution: nn.Module) -> bool:
    """Whether this is the causal, depthwise convolution of a token mixer.

    Mixers hand its weight to a kernel, or to a function that stands for one, and do not call it.
    """
    return (
        isinstance(convolution, nn.Conv1d)
        and convolution.groups == convolution.in_channels > 1
        and convolution.padding == (convolution.kernel_size[0] - 1,)
    )


def only_selects(module: nn.Module) -> bool:
    """Whether this is an indexer of sparse attention (DeepSeek V3.2, GLM-5).

    It chooses which tokens are seen. Its scores reach no output, so that nothing in it has a
    gradient, and adapters there would stay what they were at the start.
    """
    return "Indexer" in type(module).__name__


def reads_weights(module: nn.Module) -> bool:
    """Whether this is a mixer of Mamba's kind.

    It calls its `in_proj`; the weights of its other layers are read, by its own code or by its
    kernels, so that an adapter beside these layers would do nothing there.
    """
    return isinstance(getattr(module, "A_log", None), nn.Parameter) and hasattr(module, "in_proj")
