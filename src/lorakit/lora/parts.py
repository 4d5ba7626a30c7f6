"""The parts of a vision-language model, and which of them a preset of `target_modules` adapts.

transformers names them by a few words: `vision_tower`, `visual` or `vision_model` turns a picture
into features, `connector`, `multi_modal_projector` or `merger` brings these into the language
model's width. A word here is a module's own name, wherever it stands.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from lorakit.lora.architecture import language_part, output_head, without_wrappers

PARTS = ("language", "projector", "vision")

DEFAULT = ("language", "projector")
"""What is adapted where rows have pictures and a recipe does not say."""

_VISION = frozenset(
    ("vision_model", "vision_tower", "visual", "vision_encoder", "vision_embed_tokens")
)
_PROJECTOR = frozenset(
    (
        *("connector", "multi_modal_projector", "mm_projector", "projector", "aligner"),
        *("merger", "deepstack_merger_list", "patch_merger", "vision_adapter", "embed_vision"),
        *("resampler", "vision_projection", "modality_projection"),
    )
)


def part_prefixes(model: nn.Module) -> dict[str, list[str]]:
    """The paths at which the parts of a model begin, by part; of those that it has."""
    language = language_part(model)
    found: dict[str, list[str]] = {name: [] for name in PARTS}
    if language is None:
        return found
    found["language"] = [language]
    for name, _ in model.named_modules():
        path = without_wrappers(name)
        own = path.rpartition(".")[2]
        if _in(path, found["language"]):
            continue
        if own in _PROJECTOR and not _in(path, found["projector"]):
            found["projector"].append(path)
        elif own in _VISION and not _in(path, found["vision"]):
            found["vision"].append(path)
    return found


def seeing_parts(paths: Iterable[str], model: nn.Module) -> frozenset[str]:
    """Which of `vision` and `projector` the modules at these paths of a model stand in.

    One of which that is not known stands in both. The output layer stands in none.
    """
    there, head = part_prefixes(model), output_head(model)
    end = next((name for name, one in model.named_modules() if one is head), "")
    found = set[str]()
    for name in paths:
        if (path := without_wrappers(name)) == end:
            continue
        part = next((p for p in ("projector", "language", "vision") if _in(path, there[p])), None)
        found |= {"projector", "vision"} if part is None else {part} - {"language"}
    return frozenset(found)


def in_parts(names: Iterable[str], parts: Sequence[str], model: nn.Module) -> list[str]:
    """Those of the modules `names` that stand in the parts; a projector inside is its own part."""
    there = part_prefixes(model)
    chosen = []
    for name in names:
        if _in(name, there["projector"]):
            part = "projector"
        elif _in(name, there["language"]):
            part = "language"
        else:
            part = "vision" if _in(name, there["vision"]) else ""
        if part in parts:
            chosen.append(name)
    return chosen


def _in(path: str, prefixes: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in prefixes)
