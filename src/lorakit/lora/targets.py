"""From `target_modules` to the modules of the model at hand.

Names and regular expressions match as in PEFT. The presets `attention-minimal`, `attention` and
`all-linear` are found by what modules are called and where they stand, so that fused and renamed
projections (`c_attn`, `query_key_value`, `qkv_proj`) are found too. What matches nothing is an
error.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import (
    LoraLayer,
    LoraLinear,
    LoraParameter,
    LoraTiedHead,
    Mergeable,
    ModulesToSaveWrapper,
    TiedHead,
    Wrapped,
    layer_class,
)

PRESETS = ("attention-minimal", "attention", "all-linear")

# What the projections of attention are called, by the families of transformers.
_FUSED = frozenset({"c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj"})
_QUERY = frozenset({"q_proj", "query", "q_lin", "query_proj", "q", "q_attn", "to_q", "wq"})
_KEY = frozenset({"k_proj", "key", "k_lin", "key_proj", "k", "to_k", "wk"})
_VALUE = frozenset({"v_proj", "value", "v_lin", "value_proj", "v", "to_v", "wv"})
_OUTPUT = frozenset({"o_proj", "out_proj", "out_lin", "dense", "c_proj", "o", "to_out", "Wo", "wo"})
# DeepSeek's latent attention projects in two steps.
_LATENT_QUERY = frozenset({"q_a_proj", "q_b_proj"})
_LATENT_KEY_VALUE = frozenset({"kv_a_proj_with_mqa", "kv_b_proj"})

_MINIMAL = _QUERY | _VALUE | _FUSED | _LATENT_QUERY | _LATENT_KEY_VALUE
_ATTENTION = _MINIMAL | _KEY | _OUTPUT


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it was before anything was wrapped.

    A wrapped layer is yielded in place of what it wraps, and what is inside it is not.
    """
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, Wrapped):
            inside = f"{name}."
        yield name, module


def resolve_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config` adapts, in the model's order.

    Raises:
        InputError: a target matches nothing, or a module to which LoRA does not apply.
    """
    modules = {name: m for name, m in base_modules(model) if name}
    saved = set(resolve_modules_to_save(model, config))
    candidates = {
        name: m for name, m in modules.items() if name not in saved and not _inside(name, saved)
    }
    targets = "attention-minimal" if config.target_modules is None else config.target_modules
    if not targets:
        return []  # only parameters are adapted
    if isinstance(targets, str) and targets in PRESETS:
        found = _preset(targets, candidates, _output_head(model))
        if not found and config.target_modules is None and config.target_parameters:
            return []
        if not found:
            raise InputError(
                f"target_modules='{targets}' finds nothing in this model: name modules instead "
                f"(there are {listed(leaf_names(candidates))})"
            )
    elif isinstance(targets, str):
        found = [name for name in candidates if _fullmatch(targets, name)]
        if not found:
            raise _no_match(f"the expression {targets!r}", targets, candidates)
    else:
        found = [n for n in candidates if any(_is_suffix(t, n) for t in targets)]
        for target in targets:
            if not any(_is_suffix(target, name) for name in found):
                raise _no_match(f"'{target}'", target, candidates)
    found = [name for name in found if not _excluded(config.exclude_modules, name)]
    found = [name for name in found if _in_layers(config, name)]
    if not found:
        raise InputError(
            "target_modules matches only what exclude_modules and layers_to_transform leave out"
        )
    for name in found:
        if not _adaptable(candidates[name]):
            kind = type(candidates[name]).__name__
            there = listed(leaf_names(candidates), 8) or "none in this model"
            raise InputError(
                f"target_modules matches {name}, a {kind}: LoRA applies to linear, "
                f"embedding, convolution and attention layers here ({there})"
            )
    return found


def resolve_modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config` trains whole.

    Raises:
        InputError: a name matches nothing.
    """
    names = [name for name, _ in base_modules(model) if name]
    found = []
    for wanted in config.modules_to_save or []:
        matches = [name for name in names if _is_suffix(wanted, name)]
        if not matches:
            leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise InputError(
                f"modules_to_save: '{wanted}' matches no module of this model"
                f"{did_you_mean(wanted, leaves)}"
            )
        found += matches
    return list(dict.fromkeys(found))


def resolve_parameters(model: nn.Module, config: LoraConfig) -> list[tuple[str, str]]:
    """The modules' paths and the parameters' names that `target_parameters` means.

    Raises:
        InputError: a name matches no parameter.
    """
    there = [
        (path, name)
        for path, module in base_modules(model)
        for name, _ in _unwrapped(module).named_parameters(recurse=False)
        if not isinstance(module, LoraLayer) or isinstance(module, LoraParameter)
    ]
    found = []
    for wanted in config.target_parameters or []:
        matches = [pair for pair in there if _is_suffix(wanted, ".".join(pair).lstrip("."))]
        if not matches:
            endings = dict.fromkeys(".".join(pair).rpartition(".")[2] for pair in there)
            raise InputError(
                f"target_parameters: '{wanted}' matches no parameter of this model"
                f"{did_you_mean(wanted.rpartition('.')[2], endings)}"
            )
        found += matches
    return sorted(set(found), key=there.index)  # a module's own order decides the nesting


def resolve_tokens(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """The token numbers of `trainable_token_indices` by their embedding's path.

    Raises:
        InputError: a name matches no embedding.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    embeddings = {n: m for n, m in base_modules(model) if isinstance(_unwrapped(m), nn.Embedding)}
    if isinstance(wanted, list):
        get = getattr(model, "get_input_embeddings", None)
        first = next(iter(embeddings), "none")
        own = next((n for n, m in embeddings.items() if get is not None and m is get()), first)
        wanted = {own: wanted}
    found: dict[str, list[int]] = {}
    for name, tokens in wanted.items():
        paths = [path for path in embeddings if _is_suffix(name, path)]
        if not paths:
            raise InputError(
                f"trainable_token_indices: '{name}' matches no embedding of this model"
                f"{did_you_mean(name, [n.rpartition('.')[2] for n in embeddings])}"
            )
        found |= dict.fromkeys(paths, tokens)
    return found


_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_heads(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the model's new heads, which `task_type` has trained whole, as in PEFT."""
    leaves = {name.rpartition(".")[2] for name, _ in base_modules(model)}
    heads = [head for head in _HEADS.get(config.task_type or "", ()) if head in leaves]
    named = config.target_modules if isinstance(config.target_modules, list) else []
    return [head for head in heads if head not in named]


def tied_heads(model: nn.Module, path: str) -> list[str]:
    """The paths of linear layers whose weight is that of the embedding at `path`."""
    weight = _unwrapped(model.get_submodule(path)).weight
    return [
        name
        for name, module in base_modules(model)
        if isinstance(inner := _unwrapped(module), nn.Linear) and inner.weight is weight
    ]


def _unwrapped(module: nn.Module) -> Any:
    if isinstance(module, Mergeable):
        return module.get_base_layer()
    if isinstance(module, TiedHead):
        return module.base_layer
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def suffixes_for(found: list[str], model: nn.Module) -> list[str]:
    """The shortest module-path endings that match `found` and nothing else LoRA could adapt.

    This is how a preset is written to `adapter_config.json`, for readers that know no presets.
    """
    others = [n for n, m in base_modules(model) if n not in set(found) and n]
    endings: dict[str, None] = {}
    for name in found:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(_is_suffix(ending, other) for other in others):
                break
        endings[ending] = None
    return list(endings)


def leaf_names(modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of the paths of all modules that LoRA applies to, each once."""
    return list(dict.fromkeys(n.rpartition(".")[2] for n, m in modules.items() if _adaptable(m)))


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means the module at `name`, as in PEFT."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _preset(preset: str, candidates: dict[str, nn.Module], head: nn.Module | None) -> list[str]:
    linear = [name for name, m in candidates.items() if _is_linear(m) and m is not head]
    if preset == "all-linear":
        return linear
    wanted = _MINIMAL if preset == "attention-minimal" else _ATTENTION
    return [name for name in linear if name.rpartition(".")[2] in wanted and _in_attention(name)]


def _in_attention(name: str) -> bool:
    """Whether a module stands in an attention block: `dense` or `c_proj` do outside it too."""
    above = name.lower().split(".")[:-1]
    return any("attn" in part or "attention" in part for part in above)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def _adaptable(module: nn.Module) -> bool:
    own = isinstance(module, LoraLayer) and not isinstance(module, LoraParameter)
    return own or layer_class(module) is not None


def _is_linear(module: nn.Module) -> bool:
    kind = type(module) if isinstance(module, LoraLayer) else layer_class(module)
    return kind in (LoraLinear, LoraTiedHead)


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _excluded(exclude: list[str] | str | None, name: str) -> bool:
    if not exclude:
        return False
    if isinstance(exclude, str):
        return _fullmatch(exclude, name)
    return any(_is_suffix(e, name) for e in exclude)


def _in_layers(config: LoraConfig, name: str) -> bool:
    """Whether the module stands in one of `layers_to_transform`, counted as PEFT counts."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index is the layer's; later ones count what is inside it, such as experts.
        if match := re.match(rf"(?:.*?\.)?(?:{pattern})\.(?P<index>\d+)\.", name):
            return int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error


def _no_match(what: str, target: str, candidates: dict[str, nn.Module]) -> InputError:
    names = leaf_names(candidates)
    if target in names:
        hint = (
            f" (an expression is matched against whole paths; for a name give a list: [{target}])"
        )
    else:
        hint = did_you_mean(target, [*names, *PRESETS])
    return InputError(
        f"target_modules: {what} matches no module of this model{hint}. "
        f"There are {listed(names)}, and the presets {', '.join(PRESETS)}"
    )
