"""The presets of `target_modules` (`attention-minimal`, `attention`, `all-linear`), fused layers.

They are found by what modules are called and where they stand, so that fused and renamed
projections (`c_attn`, `query_key_value`, `qkv_proj`) are found too. Notices name what a
preset leaves out of a model, and why.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from lorakit.errors import InputError, did_you_mean
from lorakit.lora.architecture import (
    expert_parameters,
    language_part,
    mixes_tokens,
    only_selects,
    reads_weights,
)
from lorakit.lora.parts import DEFAULT, PARTS, in_parts, part_prefixes

PRESETS = ("attention-minimal", "attention", "all-linear")

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""The name of the one layer, and those of its parts in most models."""

# The names of the projections of attention in transformers' models.
_FUSED = frozenset(
    {"c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"}
    # What other mixers of tokens (Mamba, Gated DeltaNet, short convolutions) read their input by.
    | {"in_proj", "in_proj_qkv", "in_proj_qkvz"}
)
_QUERY = frozenset({"q_proj", "query", "q_lin", "query_proj", "q", "q_attn", "to_q", "wq"})
_KEY = frozenset({"k_proj", "key", "k_lin", "key_proj", "k", "to_k", "wk"})
_VALUE = frozenset({"v_proj", "value", "v_lin", "value_proj", "v", "to_v", "wv"})
_OUTPUT = frozenset({"o_proj", "out_proj", "out_lin", "dense", "c_proj", "o", "to_out", "Wo", "wo"})
# Gates and decays of Gated DeltaNet, beside what it makes queries, keys and values of.
_GATES = frozenset({"in_proj_z", "in_proj_b", "in_proj_a", "in_proj_ba"})
# DeepSeek's latent attention projects in two steps.
_LATENT_QUERY = frozenset({"q_a_proj", "q_b_proj"})
_LATENT_KEY_VALUE = frozenset({"kv_a_proj_with_mqa", "kv_b_proj", "kv_proj"})
_LATENT_OUTPUT = frozenset({"o_a_proj", "o_b_proj"})

_MINIMAL = _QUERY | _VALUE | _FUSED | _LATENT_QUERY | _LATENT_KEY_VALUE
_ATTENTION = _MINIMAL | _KEY | _OUTPUT | _GATES | _LATENT_OUTPUT


class PresetTargets(NamedTuple):
    """The paths of the modules that a preset means, and notices of what it left out."""

    names: list[str]
    notices: list[str]


def choose(preset: str, linear: Iterable[str], model: nn.Module) -> PresetTargets:
    """The modules that `preset` means in `model`.

    Args:
        preset: its name, and in brackets the parts of a vision-language model that are meant;
            without any it is the language part.
        linear: the paths of its linear modules without its head.
    """
    (preset, parts), names, notices = split(preset), list(linear), []
    modules = dict(model.named_modules())
    reading = {name for name, m in modules.items() if reads_weights(m)}
    mixers = {name for name, m in modules.items() if mixes_tokens(m)}
    indexers = {name for name, m in modules.items() if only_selects(m)}
    places = {name: name.rpartition(".") for name in names}  # the parent's path, and its own name
    names = [n for n in names if places[n][0] not in reading or places[n][2] == "in_proj"]
    names = [n for n in names if not indexers.intersection(_parents(n))]
    if parts:
        names = in_parts(names, parts, model)
    elif part := language_part(model):
        inside = [name for name in names if name.startswith(f"{part}.")]
        if len(inside) < len(names):
            notices.append(
                f"'{preset}' adapts the language part ({part}) alone: name modules, or give an "
                "expression, where the others are meant too"
            )
        names = inside
    if preset == "all-linear":
        if experts := expert_parameters(model):
            kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts)
            notices.append(
                f"'{preset}' leaves out the experts, which are stacked weights, not linear "
                f"layers: target_parameters=[{', '.join(kinds)}] adapts them"
            )
        return PresetTargets(names, notices)
    wanted = _MINIMAL if preset == "attention-minimal" else _ATTENTION
    found = [
        name
        for name in names
        if _meant(name) in wanted and (_in_attention(name) or places[name][0] in mixers)
    ]
    return PresetTargets(found, notices)


def _parents(name: str) -> list[str]:
    """The paths of the modules that the one at `name` stands in."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def with_parts(
    targets: list[str] | str | None, parts: Sequence[str] | None, model: nn.Module, pictures: bool
) -> list[str] | str | None:
    """`target_modules` with the parts that a preset is to mean, as `split` reads it.

    Args:
        targets: of a recipe.
        parts: `lora.parts`; None is the language model, with its projector where rows have
            pictures.
        pictures: whether rows have any.

    Raises:
        InputError: the model has no such part.
    """
    if not isinstance(targets, str) or targets not in PRESETS:
        return targets
    there = part_prefixes(model)
    if parts is None:
        if not pictures or not there["projector"]:
            return targets
        parts = DEFAULT
    for part in parts:
        if not there[part]:
            known = [name for name in PARTS if there[name]]
            raise InputError(
                f"lora.parts: the model has no part '{part}' that is known here; it has "
                f"{', '.join(known) or 'none'}: name modules in lora.target_modules"
            )
    return f"{targets}[{','.join(parts)}]"


def is_preset(targets: Any) -> TypeGuard[str]:
    """Whether `target_modules` is a preset, perhaps with parts behind it."""
    return isinstance(targets, str) and split(targets)[0] in PRESETS


def split(targets: str) -> tuple[str, tuple[str, ...]]:
    """A preset and the parts behind it: `all-linear[language,vision]`."""
    preset, bracket, rest = targets.partition("[")
    return preset, tuple(rest.removesuffix("]").split(",")) if bracket else ()


def check_parts(parts: Any, targets: Any) -> None:
    """Raises InputError for `lora.parts` that are none, or beside targets that are no preset."""
    if parts is None:
        return
    if not isinstance(parts, list) or not parts:
        raise InputError(f"lora.parts should be a list of {', '.join(PARTS)}, not {parts!r}")
    for part in parts:
        if part not in PARTS:
            hint = did_you_mean(str(part), PARTS)
            raise InputError(f"lora.parts: '{part}' is none of {', '.join(PARTS)}{hint}")
    if targets not in PRESETS:
        raise InputError(
            "lora.parts chooses among the modules of a preset, and lora.target_modules names "
            f"others: leave one of them out (the presets are {', '.join(PRESETS)})"
        )


def _meant(name: str) -> str:
    """What a layer is called, or the wrapper that clips what it reads (`q_proj.linear`)."""
    above, _, own = name.rpartition(".")
    return above.rpartition(".")[2] if own == "linear" else own


def _in_attention(name: str) -> bool:
    """Whether a module stands in an attention block: `dense` or `c_proj` do outside it too."""
    above = name.lower().split(".")[:-1]
    return any("attn" in part or "attention" in part for part in above)


def fused_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """`targets` with the layer's own name in the place of all its parts, where it has them in one.

    A part alone is left as it is: it matches nothing, which is an error later.
    """
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for whole, parts in FUSED.items():
        if whole not in leaves or leaves.intersection(parts) or not set(parts) <= set(targets):
            continue
        others = [target for target in targets if target not in parts]
        targets = others if whole in others else [*others, whole]
        warnings.warn(
            f"{', '.join(parts)} are one layer in this model, {whole}, which gets one pair of "
            "matrices",
            stacklevel=5,
        )
    return targets
