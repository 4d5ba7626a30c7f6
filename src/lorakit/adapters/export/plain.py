"""An adapter as nothing but pairs of matrices, which is all that other programs' formats hold.

What is more than that (DoRA, trained biases, whole modules, tokens, convolutions, experts) is
refused here with its name, as leaving it out would silently give another model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.derived import origin
from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import PREFIX, read_adapter, read_initial, require_finite
from lorakit.lora.config import LoraConfig
from lorakit.lora.fitting import renamed_modules
from lorakit.lora.layers.linear import is_conv1d
from lorakit.models.layouts.chatglm.config import original_folder
from lorakit.models.names import ALIASES, resolve
from lorakit.models.skeleton import skeleton

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True)
class Pair:
    """One module's update `scaling * B A`.

    A: (r, d_in), B: (d_out, r). An embedding's are PEFT's: A (r, tokens), B (d, r), and its
    update is `(scaling * B A)` transposed.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    is_embedding: bool = False

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    def folded(self, scaling: float = 1.0) -> torch.Tensor:
        """`B` for an update that is written with another scaling: (d_out, r).

        It stays in its dtype where nothing is lost by that, and is float32 otherwise.
        """
        factor = self.scaling / scaling
        wide = self.B.float() * factor
        narrow = wide.to(self.B.dtype)
        return narrow if torch.equal(narrow.float(), wide) else wide


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter's pairs by the path of their module, its configuration, and its base's name."""

    config: LoraConfig
    pairs: dict[str, Pair]
    base_model: str
    notices: tuple[str, ...] = ()


def read_plain(folder: str | Path, target: str, base: str | None = None) -> PlainAdapter:
    """The adapter in `folder`, if pairs of matrices are all that it is.

    Adapters whose start is taken off again (PiSSA, OLoRA) become pairs of twice the rank.

    Args:
        target: what cannot hold more, for the message: "vLLM".
        base: the base model, when it is not the recorded one.

    Raises:
        InputError: it is more than pairs, damaged, or does not say what it is for.
    """
    config, tensors = read_adapter(folder)
    name = base or origin(folder, config).base_model
    if not name:
        raise InputError(f"{folder} does not say which base model it is for: give --base")
    _require_plain(folder, target, config, tensors)
    copies = [key for key in tensors if key.endswith(".base_layer.weight")]
    notices = tuple(
        f"left out {key.removeprefix(PREFIX)}: a copy of the base's own weight" for key in copies
    )
    pairs = _pairs(folder, config, tensors, read_initial(folder))
    if not pairs:
        raise InputError(f"{folder} holds no pair of matrices A and B")
    return PlainAdapter(config, pairs, name, notices)


def found_at(base_model: str) -> str:
    """The base model's name as other programs find it: an alias is lorakit's own word.

    Raises:
        InputError: they cannot read it with the names that the adapter has.
    """
    if base_model in ALIASES:
        return str(resolve(base_model).path)
    if original_folder(base_model) is not None:
        raise InputError(
            f"model: {base_model} is in ChatGLM's original layout, whose modules have other names: "
            f"lorakit convert {quoted(base_model)} -o DIR, and give --base DIR"
        )
    return base_model


def fitted_plain(folder: str | Path, plain: PlainAdapter) -> PlainAdapter:
    """The adapter in `folder` under the names that its base has, of which no weight is read.

    A language model has other names alone than in one for pictures.

    Raises:
        InputError: a pair is for a module that the base has not, or for one of another shape.
    """
    model = skeleton(resolve(plain.base_model).path)
    if renamed := renamed_modules(model, plain.pairs):
        pairs = {renamed.get(path, path): pair for path, pair in plain.pairs.items()}
        one, other = next(iter(renamed.items()))
        notice = f"{len(renamed)} modules have other names in {plain.base_model} "
        plain = dataclasses.replace(
            plain,
            pairs=pairs,
            config=dataclasses.replace(
                plain.config,
                target_modules=sorted(pairs),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            ),
            notices=(*plain.notices, f"{notice}({one} is {other})"),
        )
    modules: dict[str, Any] = dict(model.named_modules())
    for path, pair in plain.pairs.items():
        d_out, d_in = pair.B.shape[0], pair.A.shape[1]
        if path not in modules:
            raise InputError(
                f"{folder} adapts {path}, which {plain.base_model} does not have: "
                "it is an adapter for another base model"
            )
        shape = tuple(modules[path].weight.shape)
        turned = pair.is_embedding or is_conv1d(modules[path])
        if shape != ((d_in, d_out) if turned else (d_out, d_in)):
            raise InputError(
                f"{folder} has an update of {d_out} x {d_in} for {path}, whose weight in "
                f"{plain.base_model} is {shape}: it is an adapter for another base model"
            )
    return plain


def _require_plain(
    folder: str | Path, target: str, config: LoraConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raises InputError with the name of what is more than a pair of matrices."""
    more = [
        (config.use_dora, "DoRA (use_dora)"),
        (bool(config.modules_to_save), f"modules trained whole ({config.modules_to_save})"),
        (config.bias != "none", f"trained biases (bias={config.bias})"),
        (config.lora_bias, "a bias of B (lora_bias)"),
        (bool(config.trainable_token_indices), "trained tokens (trainable_token_indices)"),
        (bool(config.target_parameters), "adapted parameters (target_parameters), such as experts"),
        (bool(config.layer_replication), "replicated layers (layer_replication)"),
    ]
    known = (_A, _B, _EMBEDDING_A, _EMBEDDING_B, ".base_layer.weight")
    more += [(not key.endswith(known), f"the tensor {key.removeprefix(PREFIX)}") for key in tensors]
    more += [
        (tensor.dim() != 2, f"a convolution ({key.removeprefix(PREFIX)})")
        for key, tensor in tensors.items()
        if key.endswith((_A, _B))
    ]
    found = [what for present, what in more if present]
    if found:
        raise InputError(
            f"{folder} has {listed(found, 2)}, which an adapter for {target} cannot hold: "
            f"lorakit merge {quoted(folder)} -o MODEL makes a plain model that it can use"
        )
    require_finite(tensors, folder)


def _pairs(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor],
) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for key, A in tensors.items():
        for end_A, end_B in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
            stem = key.removesuffix(end_B)
            if stem != key and stem + end_A not in tensors:
                raise InputError(f"{folder}: {key} has no partner {stem + end_A}")
            stem = key.removesuffix(end_A)
            if stem == key:
                continue
            B = tensors.get(stem + end_B)
            path = stem.removeprefix(PREFIX)
            if B is None:
                raise InputError(f"{folder}: {key} has no partner {stem + end_B}")
            r = config.rank_for(path)
            if A.shape[0] != r or B.shape[1] != r:
                raise InputError(
                    f"{folder}: {path} has factors of shapes {tuple(A.shape)} and "
                    f"{tuple(B.shape)}, and the configuration says r={r}"
                )
            pair = Pair(A, B, config.scaling_for(path), end_A == _EMBEDDING_A)
            pairs[path] = _without_start(folder, config, path, pair, initial)
    return pairs


def _without_start(
    folder: str | Path,
    config: LoraConfig,
    path: str,
    pair: Pair,
    initial: Mapping[str, torch.Tensor],
) -> Pair:
    """`B A - B₀ A₀` as one pair, where the adapter started from a part of the weight."""
    if not config.takes_start_off:
        return pair
    A, B = initial.get(f"{path}.A"), initial.get(f"{path}.B")
    if A is None or B is None:
        raise InputError(
            f"{folder} started from {config.init_lora_weights} factors that are not in it: save it "
            "with path_initial_model_for_weight_conversion where it was trained"
        )
    both = torch.cat([pair.A, A.to(pair.A)]), torch.cat([pair.B, -B.to(pair.B)], dim=1)
    return Pair(*both, pair.scaling, pair.is_embedding)
