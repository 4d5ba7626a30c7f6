"""From the paths of adapted modules back to `target_modules`, as `adapter_config.json` has it.

The other direction is `targets.py`. What is written must mean the same to readers that know no
presets.
"""

import re

from torch import nn

from lorakit.lora.presets import language_part
from lorakit.lora.targets import base_modules, is_suffix


def written_targets(found: list[str], model: nn.Module) -> list[str] | str:
    """`suffixes_for`, or an expression where those of a part of the model are many.

    A model for pictures has layers of the same names and numbers beside those of its language part.
    """
    suffixes = suffixes_for(found, model)
    part = language_part(model)
    if part is None or not any("." in suffix for suffix in suffixes):
        return suffixes
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in found)
    expression = rf"{re.escape(part)}\..*\.({'|'.join(map(re.escape, kinds))})"
    same = [name for name, _ in base_modules(model) if re.fullmatch(expression, name)] == found
    return expression if same else suffixes


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
