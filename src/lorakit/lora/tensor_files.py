"""Files of named tensors that others wrote: safetensors, and PyTorch's and NumPy's older formats.

The older ones are pickles, or may hold some, which could run any program. Here they are read by
readers that build tensors and nothing else, and refuse whatever asks for more.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorakit.errors import InputError, first_line

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, on the processor; its ending says its format.

    Raises:
        InputError: it is damaged, holds no tensor, or something else than tensors.
    """
    if path.suffix in PICKLED:
        tensors = _pickled(path)
    elif path.suffix == ".npz":
        tensors = _numpy(path)
    else:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    if not tensors:
        raise InputError(f"{path} holds no tensor: save or copy the adapter again")
    return tensors


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged, or a pickle of more than tensors, which could run any program "
            f"and is not read ({_reason(error)}): save the adapter again, as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # of a checkpoint with other things beside it
    plain = isinstance(found, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in found.items()
    )
    if not plain:
        raise InputError(f"{path} does not hold tensors by name: save the adapter's state_dict()")
    return {key: value.detach() for key, value in found.items()}


def _reason(error: Exception) -> str:
    """What the reader found, without its advice to read the file unsafely."""
    words = " ".join(str(error).split()).partition(" Check the documentation")[0]
    _, found, rest = words.partition("WeightsUnpickler error:")
    return (rest if found else words).strip()[:120] or type(error).__name__


def _numpy(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged or cut off ({first_line(error)}): save or copy the adapter again"
    )
