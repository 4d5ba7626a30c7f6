"""Adapters of other tools into PEFT's files: mlx-lm's, loralib's, and kohya's of language models.

Each file is told by its keys, and every key must mean one module of the base model: what does not
fit, or could mean two things, is refused by name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from lorakit import atomic
from lorakit.adapters.layout_names import FACTORS_A, native_adapter
from lorakit.errors import InputError, listed
from lorakit.folder_lock import reserves
from lorakit.lora.checkpoint import PREFIX, write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.lora.locate import PICKLED_NAME, WEIGHTS_NAME
from lorakit.lora.targets import written_targets
from lorakit.lora.tensor_files import read_tensors
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton

_KOHYA = re.compile(r"lora_(?P<path>.+?)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_OTHER_MODELS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")


@dataclass(frozen=True)
class Imported:
    """What was written, and out of which tool's files it came."""

    output: str
    tool: str
    modules: int
    ranks: dict[int, int]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Factors:
    """One module's A (r, d_in) and B (d_out, r), and the alpha of `alpha / r`."""

    A: torch.Tensor
    B: torch.Tensor
    alpha: float


@reserves("output")
def import_adapter(
    source: str | Path, output: str | Path, *, base: str | None = None, alpha: float | None = None
) -> Imported:
    """Writes the adapter in `source`, a file or a folder, to the new folder `output`.

    A folder is mlx-lm's, or PEFT's with the module names of a base layout's own code.

    Args:
        base: the base model; a folder may name it itself.
        alpha: loralib's `lora_alpha`, which its files do not have; for mlx-lm it takes the place
            of the settings' scale, and is divided by the rank.

    Raises:
        InputError: the file is of no known kind, damaged, or for another base model.
    """
    if any((Path(source) / name).is_file() for name in (WEIGHTS_NAME, PICKLED_NAME)):
        if alpha is not None:
            raise InputError("--alpha: leave it out, PEFT's files state it")
        tool, config, own = native_adapter(Path(source), base)
        counts = Counter(t.shape[0] for key, t in own.items() if key.endswith(FACTORS_A))
        return _written(output, config, own, tool, counts)
    path, settings = _locate(Path(source))
    tensors = read_tensors(path)
    base = base or settings.get("model")
    if not isinstance(base, (str, NoneType)):
        raise InputError(
            f"{source} names the base model {base!r}, which is not a string: give --base"
        )
    if not base:
        raise InputError(f"{source} does not say which base model it is for: give --base")
    model = skeleton(resolve(base).path)
    notices: tuple[str, ...] = ()
    if any(key.startswith("lora_") for key in tensors):
        tool, found = "kohya", _from_kohya(path, tensors, model)
    elif any(key.endswith(".lora_a") for key in tensors):
        tool, (found, notices) = "mlx-lm", _from_mlx(path, tensors, settings, alpha)
    elif any(key.endswith(".lora_A") for key in tensors):
        tool, (found, notices) = "loralib", _from_loralib(path, tensors, alpha)
    else:
        raise InputError(
            f"{path} holds no adapter that lorakit knows: no key is mlx-lm's (….lora_a), "
            f"loralib's (….lora_A) or kohya's (lora_….lora_down.weight). It has "
            f"{listed(sorted(tensors), 3)}"
        )
    if alpha is not None and tool == "kohya":
        raise InputError(f"--alpha: leave it out, {tool}'s files state it")
    config, own = _as_peft(path, found, model, base)
    counts = Counter(factors.A.shape[0] for factors in found.values())
    return _written(output, config, own, tool, counts, notices)


def _written(
    output: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    tool: str,
    ranks: Counter[int],
    notices: tuple[str, ...] = (),
) -> Imported:
    with atomic.new_folder(output) as folder:
        write_adapter(folder, config, tensors)
    return Imported(str(output), tool, ranks.total(), dict(sorted(ranks.items())), notices)


def _locate(source: Path) -> tuple[Path, dict[str, Any]]:
    """The safetensors file, and mlx-lm's settings where they lie beside it."""
    path = source
    if source.is_dir():
        names = ("adapters.safetensors", "adapters.npz")
        path = next((p for name in names if (p := source / name).is_file()), source / names[0])
    if not path.is_file():
        what = "holds no adapters.safetensors" if source.is_dir() else "is not there"
        raise InputError(f"{source} {what}: give a .safetensors file or mlx-lm's adapter folder")
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        return path, {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{config} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{config} must hold one JSON object")
    return path, values


def _from_mlx(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    alpha: float | None,
) -> tuple[dict[str, _Factors], tuple[str, ...]]:
    """mlx-lm's `lora_a` (d_in, r), `lora_b` (r, d_out), and one scale for all.

    The first versions multiplied by `scale * alpha / rank`, later ones by `scale` alone and went on
    writing the alpha that they did not use; those write `num_layers` for `lora_layers`.

    Args:
        alpha: takes the place of what the settings say.
    """
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise InputError(f"{path} is mlx-lm's {kind}, and only its lora can be imported")
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    pairs = _paired(path, tensors, ".lora_a", ".lora_b")
    if alpha is not None:
        _require_positive(alpha)
        return {name: _Factors(a.T, b.T, alpha) for name, (a, b) in pairs.items()}, ()
    scale = _setting(path, parameters, "scale")
    notices: tuple[str, ...] = ()
    if parameters.get("alpha") is not None:
        old = _setting(path, parameters, "alpha")
        used, how = scale, "the scale alone"
        if "num_layers" not in settings:
            rank = parameters.get("rank") or max(a.shape[-1] for a, _ in pairs.values())
            used, how = scale * old / _setting(path, {"rank": rank}, "rank"), "scale * alpha / rank"
        notices = (
            f"the settings have an alpha, {old:g}, beside the scale, {scale:g}: this version of "
            f"mlx-lm multiplies by {how}, {used:g} (if it was trained otherwise, give --alpha, "
            "which is divided by the rank)",
        )
        scale = used
    found = {name: _Factors(a.T, b.T, scale * a.shape[-1]) for name, (a, b) in pairs.items()}
    return found, notices


def _require_positive(alpha: float) -> None:
    if not alpha > 0:
        raise InputError(f"--alpha must be a number above 0, not {alpha!r}")


def _setting(path: Path, parameters: Mapping[str, Any], name: str) -> float:
    """A number above 0 of mlx-lm's `lora_parameters`."""
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InputError(
            f"{path.with_name('adapter_config.json')} must say lora_parameters.{name}, "
            f"a number above 0, not {value!r}"
        )
    return float(value)


def _from_loralib(
    path: Path, tensors: Mapping[str, torch.Tensor], alpha: float | None
) -> tuple[dict[str, _Factors], tuple[str, ...]]:
    """loralib's `lora_A` (r, d_in) and `lora_B` (d_out, r), beside the model's own weights."""
    if alpha is None:
        raise InputError(f"{path} is loralib's, which does not hold lora_alpha: give --alpha")
    _require_positive(alpha)
    own = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    notice = (
        f"left out {len(tensors) - len(own)} tensors that are the model's own: if they were saved "
        "in evaluation mode, loralib had merged the update into them"
    )
    pairs = _paired(path, own, ".lora_A", ".lora_B")
    found = {name: _Factors(A, B, alpha) for name, (A, B) in pairs.items()}
    return found, (notice,) if len(own) < len(tensors) else ()


def _from_kohya(
    path: Path, tensors: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, _Factors]:
    """kohya's `lora_down` (r, d_in), `lora_up` (d_out, r) and alpha; without one it is r."""
    if foreign := [key for key in tensors if key.startswith(_OTHER_MODELS)]:
        raise InputError(
            f"{path} is an adapter of an image model ({foreign[0]}), not of a language model"
        )
    if unknown := [key for key in tensors if not _KOHYA.fullmatch(key)]:
        raise InputError(f"{path}: {listed(sorted(unknown), 3)} is not part of a plain LoRA")
    meanings: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        meanings.setdefault(name.replace(".", "_"), []).append(name)
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KOHYA.fullmatch(key)
        assert match is not None
        meant = meanings.get(match["path"], [])
        if len(meant) != 1:
            what = f"could mean {listed(meant)}" if meant else "names no module of the base model"
            raise InputError(f"{path}: {key} {what}")
        renamed[f"{meant[0]}.{match['part']}"] = tensor
    alphas = {k.removesuffix(".alpha"): t for k, t in renamed.items() if k.endswith(".alpha")}
    for name, tensor in alphas.items():
        if tensor.numel() != 1:
            raise InputError(f"{path}: the alpha of {name} is not a single number")
    factors = {k: t for k, t in renamed.items() if not k.endswith(".alpha")}
    pairs = _paired(path, factors, ".lora_down.weight", ".lora_up.weight")
    if orphans := alphas.keys() - pairs.keys():
        raise InputError(f"{path}: {sorted(orphans)[0]} has an alpha and no factors")
    return {
        name: _Factors(A, B, float(alphas[name]) if name in alphas else float(A.shape[0]))
        for name, (A, B) in pairs.items()
    }


def _paired(
    path: Path, tensors: Mapping[str, torch.Tensor], first: str, second: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors of every module; a key that is neither, or has no partner, is refused."""
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        stem, end = (
            (key.removesuffix(first), second)
            if key.endswith(first)
            else (key.removesuffix(second), first)
        )
        if stem == key:
            raise InputError(f"{path}: {key} is not part of a plain LoRA")
        if stem + end not in tensors:
            raise InputError(f"{path}: {key} has no partner {stem + end}")
        if tensor.dim() != 2:
            raise InputError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, and only matrices are imported"
            )
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: {key} is {dtype}, and only floats of 16 bits or more are read"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {key} holds NaN or Inf")
        if key.endswith(first):
            pairs[stem] = tensor, tensors[stem + end]
    return pairs


def _as_peft(
    path: Path, found: Mapping[str, _Factors], model: nn.Module, base: str
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors under PEFT's keys, every shape compared with the base."""
    modules = dict(model.named_modules())
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in found.items():
        module = modules.get(name)
        A, B = factors.A, factors.B
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise InputError(f"{path}: {name} is not a layer of {base} that an adapter can change")
        if A.shape[0] != B.shape[1]:
            raise InputError(
                f"{path}: {name} has factors of ranks {A.shape[0]} and {B.shape[1]}: several "
                "updates stacked into one (loralib's MergedLinear) cannot be imported"
            )
        as_linear = isinstance(module, nn.Linear)
        shape = tuple(weight.shape) if as_linear else tuple(weight.shape[::-1])
        if (B.shape[0], A.shape[1]) != shape:
            raise InputError(
                f"{path}: {name} has an update of shape {(B.shape[0], A.shape[1])}, and {base} a "
                f"weight of {shape} there: it is for another base model"
            )
        if isinstance(module, nn.Embedding):
            ends = "lora_embedding_A", "lora_embedding_B"
        else:
            ends = "lora_A.weight", "lora_B.weight"
        tensors |= {f"{PREFIX}{name}.{ends[0]}": A, f"{PREFIX}{name}.{ends[1]}": B}
    config = LoraConfig(
        target_modules=written_targets(list(found), model),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    ranks = {name: factors.A.shape[0] for name, factors in found.items()}
    return config.with_ranks(ranks, {name: f.alpha for name, f in found.items()}), tensors
