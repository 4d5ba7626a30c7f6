"""From `target_modules` to the modules of a model, and back.

Names and regular expressions match as in PEFT; presets are in `presets.py`. A target without a
match is an error. What is written back means the same to readers that know no presets.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora.architecture import (
    input_embedding,
    is_read,
    language_part,
    mixes_tokens,
    only_selects,
    output_head,
    reads_weights,
    without_wrappers,
)
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import (
    LoraLinear,
    LoraMultiheadAttention,
    WrappedModule,
    layer_class,
    unwrapped,
)
from lorakit.lora.parts import part_prefixes
from lorakit.lora.patterns import endings, layer_index, matches_whole, without_match
from lorakit.lora.presets import FUSED, PRESETS, choose, is_preset


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as it was before anything was wrapped, `torch.compile` included.

    A wrapped layer is yielded in place of what it wraps, and what is inside it is not.
    """
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, WrappedModule):
            inside = f"{name}."
        yield without_wrappers(name), module


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
    if is_preset(targets):
        head = output_head(model)
        linear = [name for name, m in candidates.items() if _is_linear(m) and m is not head]
        chosen = choose(targets, linear, model)
        found = chosen.names
        for notice in chosen.notices if not config.target_parameters else []:
            warnings.warn(notice, stacklevel=6)
        if not found and config.target_modules is None and config.target_parameters:
            return []
        if not found:
            raise InputError(
                f"target_modules='{targets}' finds nothing in this model: name modules instead "
                f"(there are {listed(leaf_names(candidates))})"
            )
    elif isinstance(targets, str):
        found = [n for n in candidates if matches_whole(targets, n, config.time_left)]
        if not found:
            raise _no_match(f"the expression {targets!r}", targets, candidates)
    else:
        names = set(targets)
        found = [n for n in candidates if not names.isdisjoint(endings(n))]
        meant = {ending for name in found for ending in endings(name)}
        for target in targets:
            if target not in meant:
                raise _no_match(f"'{target}'", target, candidates, _coverage(targets, found))
    kept = [name for name in found if not _excluded(config, name)]
    exclude = config.exclude_modules
    if exclude and not any(_excluded(config, name) for name in modules):
        message = f"You have passed exclude_modules={exclude!r} but no modules were excluded"
        warnings.warn(message, stacklevel=6)
    found = [name for name in kept if _in_layers(config, name)]
    if not found:
        raise InputError(
            "target_modules matches only what exclude_modules and layers_to_transform leave out"
        )
    for name in found:
        if not _adaptable(candidates[name]):
            kind = type(candidates[name]).__name__
            there = listed(leaf_names(candidates), 8) or "none in this model"
            others = any(_adaptable(candidates[other]) for other in found)
            cure = ". exclude_modules leaves it out, a preset means the others" if others else ""
            raise InputError(
                f"target_modules matches {name}, a {kind}: LoRA applies to linear, "
                f"embedding, convolution and attention layers here ({there}){cure}"
            )
        above, _, own = name.rpartition(".")
        mixer = model.get_submodule(above)
        convolution = is_read(candidates[name]) and mixes_tokens(mixer)
        if convolution or (own == "dt_proj" and reads_weights(mixer)):
            reader = "its mixer" if convolution else "Mamba"
            raise InputError(
                f"target_modules matches {name}, whose weight {reader} reads without calling the "
                "layer, so that an adapter there would do nothing: in_proj is called"
            )
    indexers = [name for name, m in modules.items() if only_selects(m)]
    if still := [name for name in found if _inside(name, indexers)]:
        warnings.warn(
            f"target_modules matches {len(still)} layers of indexers ({listed(still, 2)}), which "
            "only choose the tokens that attention sees: nothing there has a gradient, and these "
            "adapters stay as they start",
            stacklevel=6,
        )
    return found


def warn_of_unused(config: LoraConfig, paths: Iterable[str]) -> None:
    """Warns of patterns for ranks and alphas that mean none of the adapted `paths`."""
    paths = list(paths)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        unused = without_match(patterns, paths, config.time_left)
        if unused:
            message = f"{field}: {unused} did not match any targeted module"
            warnings.warn(message, RuntimeWarning, stacklevel=6)


def resolve_modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config` trains whole.

    Raises:
        InputError: a name matches nothing.
    """
    names = [name for name, _ in base_modules(model) if name]
    found = []
    for wanted in config.modules_to_save or []:
        # PEFT's files name every head that a task's models may have.
        optional = wanted in _HEADS.get(config.task_type or "", ())
        # To PEFT `classifier` is DistilBERT's `pre_classifier` too, as its name ends so.
        own = [name for name in names if name.endswith(wanted)]
        found += own or _matching(wanted, names, "modules_to_save", "" if optional else "module")
    return list(dict.fromkeys(found))


def _matching(wanted: str, paths: Iterable[str], field: str, kind: str) -> list[str]:
    """Those of `paths` that the name `wanted` means.

    Raises:
        InputError: there is none, unless `kind` is empty.
    """
    found = [path for path in paths if is_suffix(wanted, path)]
    if kind and not found:
        near = did_you_mean(wanted.rpartition(".")[2], dict.fromkeys(map(_leaf, paths)))
        raise InputError(f"{field}: '{wanted}' matches no {kind} of this model{near}")
    return found


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def resolve_parameters(model: nn.Module, config: LoraConfig) -> list[tuple[str, str]]:
    """The modules' paths and the parameters' names that `target_parameters` means.

    Raises:
        InputError: a name matches no parameter.
    """
    there = {
        ".".join((path, name)).lstrip("."): (path, name)
        for path, module in base_modules(model)
        for name, _ in unwrapped(module).named_parameters(recurse=False)
    }
    wanted = config.target_parameters or []
    found = {p for one in wanted for p in _matching(one, there, "target_parameters", "parameter")}
    # A module's own order decides the nesting.
    return [pair for path, pair in there.items() if path in found]


def resolve_tokens(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """The token numbers of `trainable_token_indices` by the path of their embedding or head.

    Raises:
        InputError: a name matches neither.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    head = output_head(model)
    embeddings = {
        n: m
        for n, m in base_modules(model)
        if isinstance(unwrapped(m), nn.Embedding) or (m is head and isinstance(wanted, dict))
    }
    if isinstance(wanted, list):
        first, read = next(iter(embeddings), "none"), input_embedding(model)
        own = next((name for name, m in embeddings.items() if m is read), first)
        wanted = {own: wanted}
    found: dict[str, list[int]] = {}
    for name, tokens in wanted.items():
        paths = _matching(name, embeddings, "trainable_token_indices", "embedding")
        found |= dict.fromkeys(paths, tokens)
    return found


_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_heads(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the model's new heads, which `task_type` has trained whole, as in PEFT."""
    leaves = {_leaf(name) for name, _ in base_modules(model)}
    heads = [head for head in _HEADS.get(config.task_type or "", ()) if head in leaves]
    named = config.target_modules if isinstance(config.target_modules, list) else []
    return [head for head in heads if head not in named]


def tied_modules(model: nn.Module, path: str) -> list[str]:
    """The paths of other linear layers and embeddings with the weight of the one at `path`."""
    return [name for name in _ties(model).get(path, ()) if name != path]


def tied_embedding(model: nn.Module, path: str) -> str:
    """The first embedding whose weight the module at `path` has, or `path` itself."""
    tied = _ties(model).get(path, ())
    kinds = {name: unwrapped(model.get_submodule(name)) for name in tied}
    return next((name for name, m in kinds.items() if isinstance(m, nn.Embedding)), path)


def warn_of_ties(model: nn.Module, config: LoraConfig, paths: Iterable[str]) -> None:
    """Warns where only some modules that share a weight are adapted, or tying has no effect."""
    ties = _ties(model)
    adapted = [path for path in paths if path in ties]
    if adapted and not config.ensure_weight_tying:
        message = (
            f"{listed(adapted)} share their weight with other modules, which keep it as it is, as "
            "`ensure_weight_tying` is not set to True"
        )
    elif config.ensure_weight_tying and not ties:
        message = "ensure_weight_tying=True, but no tied modules were found in the model"
    elif config.ensure_weight_tying and not adapted:
        message = "ensure_weight_tying=True, but no tied modules are added: none is adapted"
    else:
        return
    warnings.warn(message, stacklevel=6)


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """The paths of linear layers and embeddings that share a weight, by each of these paths."""
    by_weight: dict[int, list[str]] = {}
    for name, module in base_modules(model):
        inner = unwrapped(module)
        if isinstance(inner, (nn.Linear, nn.Embedding)):
            weight = getattr(inner.weight, "shared", inner.weight)  # before it was rounded
            by_weight.setdefault(id(weight), []).append(name)
    return {name: paths for paths in by_weight.values() if len(paths) > 1 for name in paths}


def leaf_names(modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of the paths of all modules that LoRA applies to, each once."""
    return list(dict.fromkeys(_leaf(n) for n, m in modules.items() if _adaptable(m)))


def _adaptable(module: nn.Module) -> bool:
    return layer_class(unwrapped(module)) is not None


def _is_linear(module: nn.Module) -> bool:
    kind = layer_class(unwrapped(module))
    return kind is not None and issubclass(kind, LoraLinear) and kind is not LoraMultiheadAttention


def is_suffix(target: str, name: str) -> bool:
    """Whether a name in `target_modules` means the module at the path `name`, as in PEFT."""
    return name == target or name.endswith(f".{target}")


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _excluded(config: LoraConfig, name: str) -> bool:
    exclude = config.exclude_modules
    if not exclude:
        return False
    if isinstance(exclude, str):
        return matches_whole(exclude, name, config.time_left)
    return any(is_suffix(e, name) for e in exclude)


def _in_layers(config: LoraConfig, name: str) -> bool:
    """Whether the module stands in one of `layers_to_transform`, counted as PEFT counts."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index is the layer's; later ones count what is inside it, such as experts.
        if (index := layer_index(pattern, name, config.time_left)) is not None:
            return index in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _coverage(targets: Iterable[str], found: Iterable[str]) -> str:
    """How many modules each target matches, for a message."""
    counts = Counter(t for name in found for t in targets if is_suffix(t, name))
    return listed(f"{target} {counts[target]}" for target in targets)


def _no_match(
    what: str, target: str, candidates: dict[str, nn.Module], coverage: str = ""
) -> InputError:
    names = leaf_names(candidates)
    if target in names:
        hint = (
            f" (an expression is matched against whole paths; for a name give a list: [{target}])"
        )
    elif whole := next((w for w, parts in FUSED.items() if target in parts and w in names), None):
        hint = f" (this model computes {', '.join(FUSED[whole])} by one layer: '{whole}')"
    else:
        hint = did_you_mean(target, [*names, *PRESETS])
    matched = f"Modules matched: {coverage}. " if coverage else ""
    return InputError(
        f"target_modules: {what} matches no module of this model{hint}. {matched}"
        f"There are {listed(names)}, and the presets {', '.join(PRESETS)}"
    )


def written_targets(found: list[str], model: nn.Module) -> list[str] | str:
    """`suffixes_for`, or an expression where those of a part of the model are many.

    A model for pictures has layers of the same names and numbers beside those of its language part.
    """
    suffixes = suffixes_for(found, model)
    part = language_part(model)
    if part is None or not any("." in suffix for suffix in suffixes):
        return suffixes
    kinds = dict.fromkeys(map(_leaf, found))
    parts = [part, *(p for p in part_prefixes(model)["projector"] if _any_in(p, found))]
    inside = "|".join(map(re.escape, parts))
    if len(parts) == 1:
        expression = rf"{inside}\..*\.({'|'.join(map(re.escape, kinds))})"
    else:
        expression = rf"({inside})\.(.*\.)?({'|'.join(map(re.escape, kinds))})"
    same = [name for name, _ in base_modules(model) if re.fullmatch(expression, name)] == found
    return expression if same else suffixes


def _any_in(part: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


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
            if not any(is_suffix(ending, other) for other in others):
                break
        endings[ending] = None
    return list(endings)
