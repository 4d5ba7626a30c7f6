"""Loading a base model and its tokenizer, in the dtype that the machine computes fastest.

Where a name leads is `names.py`'s work; adapters are put on by others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.names import resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def load_model(
    name: str, dtype: str | torch.dtype | None = None, *, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name` and its tokenizer, ready for use.

    Args:
        name: an alias (`smollm2-135m-instruct`), a folder, a `.gguf` file, or a hub id.
        dtype: `auto` or None for `best_dtype`, or a dtype.
        device: where to; None means a GPU if there is one, else the CPU.

    Raises:
        InputError: the name leads nowhere, or what lies there cannot be loaded.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()  # loading is a matter of a second
    source = resolve(str(name))
    device = device or best_device()
    chosen = torch_dtype(dtype, device)
    try:
        if source.is_gguf:
            model, tokenizer = load_gguf(source.path, chosen)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=chosen, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"model: {name} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"model: {name} holds a damaged file: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config._name_or_path = str(name)
    assert isinstance(model, torch.nn.Module)
    return model.to(device).eval(), tokenizer


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of the weights as the model's files hold them; float32 when they do not say."""
    import torch
    from transformers import AutoConfig

    source = resolve(str(name))
    if source.is_gguf:
        return torch.float32
    config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    return getattr(config, "dtype", None) or torch.float32


def load_gguf(path: Path, dtype: str | torch.dtype) -> tuple[Any, Any]:
    """A GGUF file, dequantised, with the tokenizer inside it."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    # Newer releases keep the weights packed, which cannot be trained, unless told otherwise.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **where, **plain)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    # The weights are plain now; with these marks left transformers would refuse to save them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def best_device() -> str:
    """`cuda`, `mps` or `cpu`, the first that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(has for name, has in capabilities.items() if name.endswith("bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def torch_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype:
    """The dtype that a recipe's or a user's word means on `device`."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return best_dtype(device)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return getattr(torch, dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
