"""Which adapters can stand on one model: those that leave the base itself as it is."""

from collections.abc import Mapping

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig


def require_beside(name: str, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
    """Raises InputError when the adapter `name` cannot stand beside `others`, by their names."""
    if name in others:
        raise InputError(f"there is an adapter '{name}' already")
    if not others:
        return
    every = [config, *others.values()]
    if any(one.bias != "none" for one in every):
        raise InputError(
            "an adapter with bias='all' or 'lora_only' trains the base itself and cannot "
            "stand beside others: set bias='none' for all of them"
        )
    for init in (one.init for one in every):
        if init.kind.changes_base:
            raise InputError(
                f"an adapter with init_lora_weights='{init.value}' quantises the base itself and "
                "cannot stand beside others"
            )
