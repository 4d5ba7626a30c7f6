"""From the hidden states of a text's tokens to one vector, as a model's folder says.

sentence-transformers describes an embedding model in `modules.json`: a transformer, then how its
hidden states are pooled (Reimers and Gurevych 2019, arXiv:1908.10084), dense layers, and whether
the vector has length 1. This reads these files and computes what stands behind the transformer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, first_line, listed

_MODULES = "modules.json"


def _mean(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (h * mask).sum(1) / mask.sum(1).clamp_min(1e-9)


def _max(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return h.masked_fill(mask == 0, -torch.inf).amax(1)


def _weighted_mean(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _mean(h, mask * torch.arange(1, h.shape[1] + 1, device=h.device)[None, :, None])


def _last(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    at = mask[:, :, 0].sum(1).long() - 1
    return h[torch.arange(len(h), device=h.device), at]


MODES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda h, mask: h[:, 0],
    "max_tokens": _max,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": lambda h, mask: (h * mask).sum(1) / mask.sum(1).clamp_min(1e-9).sqrt(),
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
"""Of hidden states (rows, width, d) with a mask (rows, width, 1), by sentence-transformers' names.

Padding stands on the right. Several modes are put side by side, in this order.
"""

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Pooling:
    """How hidden states become a text's vector.

    Attributes:
        modes: keys of `MODES`.
        dense: layers behind the pooling.
        normalize: whether the vector has length 1.
        longest: the most tokens of a text that the model was made for; None for the context's.
        lower_case: whether texts are in lower case before they are tokenized.
        notice: what a user should know.
    """

    modes: tuple[str, ...]
    dense: tuple[nn.Module, ...] = ()
    normalize: bool = False
    longest: int | None = None
    lower_case: bool = False
    notice: str = ""

    def __call__(self, h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The vectors (rows, d') of hidden states (rows, width, d), in float32.

        Args:
            lengths: (rows,) the tokens of each row; what follows them is padding.
        """
        h = h.float()
        places = torch.arange(h.shape[1], device=h.device)
        mask = (places < lengths[:, None]).float()[..., None]
        made = torch.cat([MODES[mode](h, mask) for mode in self.modes], dim=-1)
        for layer in self.dense:
            made = layer(made)
        return nn.functional.normalize(made, dim=-1) if self.normalize else made

    def width(self, hidden_size: int) -> int:
        """The numbers of a vector, of a model with hidden states of `hidden_size`."""
        linears = [m for one in self.dense for m in one.modules() if isinstance(m, nn.Linear)]
        sizes = [linear.out_features for linear in linears]
        return int(sizes[-1]) if sizes else hidden_size * len(self.modes)


LAST_TOKEN = Pooling(("lasttoken",), normalize=True)
"""Of a causal model that says nothing: the last token has read all others (arXiv:2401.00368)."""

MEAN = Pooling(
    ("mean_tokens",),
    notice="its folder has no modules.json, so an embedding is the mean of the last hidden states, "
    "of any length, as sentence-transformers computes it",
)
"""Of an encoder that says nothing."""


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of the model in `folder`; None where it has no `modules.json`.

    Raises:
        InputError: the files are damaged, or ask for something else than is computed here.
    """
    if not (folder / _MODULES).is_file():
        return None
    modules = _json(folder / _MODULES)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise InputError(f"model: {folder / _MODULES} is no list of modules")
    parts = [(str(one.get("type", "")).rpartition(".")[2], _inside(folder, one)) for one in modules]
    kinds = [kind for kind, _ in parts]
    dense = kinds.count("Dense")
    expected = ["Transformer", "Pooling", *["Dense"] * dense, "Normalize"]
    if kinds not in (expected, expected[:-1]):
        raise InputError(
            f"model: {folder} has the modules {listed(kinds)}; Transformer, Pooling, Dense and "
            "Normalize are computed, in this order"
        )
    # `sentence_bert_config.json`, or with the name of another architecture.
    own = next(map(_settings, sorted(folder.glob("sentence_*_config.json"))), {})
    longest = own.get("max_seq_length")
    return Pooling(
        _modes(parts[1][1]),
        tuple(_dense(place) for kind, place in parts if kind == "Dense"),
        normalize=kinds[-1] == "Normalize",
        longest=longest if isinstance(longest, int) and longest > 2 else None,
        lower_case=own.get("do_lower_case") is True,
        notice=_prompt_notice(folder),
    )


def is_embedding_model(folder: Path) -> bool:
    """Whether the files in `folder` are those of an embedding model of sentence-transformers."""
    return (folder / _MODULES).is_file()


def _modes(folder: Path) -> tuple[str, ...]:
    settings = _settings(folder / "config.json")
    named = settings.get("pooling_mode")  # the newer form: one name, or several
    wanted = {str(name) for name in ([named] if isinstance(named, str) else named or ())}
    wanted |= {
        key.removeprefix("pooling_mode_")
        for key, value in settings.items()
        if key.startswith("pooling_mode_") and value is True
    }
    wanted = {next((mode for mode in MODES if mode.startswith(n)), n) for n in wanted}
    if unknown := wanted - MODES.keys():
        raise InputError(f"model: {folder} asks for the pooling {listed(sorted(unknown))}")
    if not wanted:
        raise InputError(f"model: {folder / 'config.json'} names no pooling mode")
    return tuple(mode for mode in MODES if mode in wanted)


def _dense(folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    settings = _settings(folder / "config.json")
    name = str(settings.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise InputError(f"model: {folder} has the activation {name}, which is not computed here")
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
        weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({k.removeprefix("linear."): t.float() for k, t in tensors.items()})
    except Exception as error:  # of the reader of safetensors too, which has its own kind
        raise InputError(
            f"model: {file} cannot be read as a dense layer: {first_line(error)}"
        ) from error
    return nn.Sequential(linear.requires_grad_(False), _ACTIVATIONS[name]())


def _prompt_notice(folder: Path) -> str:
    settings = _settings(folder / "config_sentence_transformers.json")
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    texts = [f"{name}: {text!r}" for name, text in prompts.items() if text]
    if not texts:
        return ""
    added = f" (sentence-transformers adds {default!r} by itself)" if default in prompts else ""
    return f"it was trained with prompts before the texts{added}: send {listed(texts, 3)} with them"


def _inside(folder: Path, module: Mapping[str, Any]) -> Path:
    place = folder / str(module.get("path", ""))
    if not place.resolve().is_relative_to(folder.resolve()) and not place.is_symlink():
        raise InputError(f"model: {folder / _MODULES} names a folder that lies elsewhere")
    return place


def _settings(file: Path) -> dict[str, Any]:
    """What a JSON object in a file says; nothing where there is no file."""
    values = _json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"model: {file} is no JSON object")
    return values


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model: {file} cannot be read: {first_line(error)}") from error
