"""A pytest plugin: PEFT's tests see lorakit, and those of other methods are left out.

`PEFT_SUITE_SUBJECT=peft` leaves PEFT in place, to see what passes here at all.
"""

import inspect
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest

OTHER_METHODS = tuple(
    config
    for name, config in vars(peft).items()
    if inspect.isclass(config)
    and issubclass(config, peft.PeftConfig)
    and config not in (peft.PeftConfig, peft.LoraConfig)
    and name.endswith("Config")
)
_OTHER_WORDS = re.compile(
    "|".join(
        r"\b" + re.escape(word)
        for config in OTHER_METHODS
        for word in (config.__name__, f"Test{config.__name__.removesuffix('Config')}")
    )
)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PEFT_SUITE_SUBJECT", "lorakit") == "lorakit":
        from peft_suite.names import install

        install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    patterns, fields = _out_of_scope()
    kept, left = [], []
    for item in items:
        name = item.nodeid.partition("/")[2]
        listed = any(pattern.search(name) for pattern in patterns) or _sets(item, fields)
        (left if listed or _is_for_another_method(item) else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
    everything_is_here()


def _out_of_scope() -> tuple[list[re.Pattern[str]], set[str]]:
    """The names of tests, and the fields of configurations, that are left out."""
    text = Path(__file__).with_name("out_of_scope.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    fields = {line.removeprefix("field ") for line in lines if line.startswith("field ")}
    return [re.compile(line) for line in lines if not line.startswith("field ")], fields


def _sets(item: Any, fields: set[str]) -> bool:
    """Whether a configuration among a test's parameters sets one of these fields."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    given = [
        value if isinstance(value, dict) else getattr(value, "__dict__", {}) for value in values
    ]
    return any(config.get(field) for config in given for field in fields)


def _is_for_another_method(item: Any) -> bool:
    """Whether a test's parameters, or else its text, are about another method than LoRA."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    configs = [_config_class(value) for value in values]
    if any(config in OTHER_METHODS for config in configs):
        return True
    if any(config is not None for config in configs):
        return False
    if item.cls is not None and _OTHER_WORDS.search(item.cls.__name__):
        return True
    text = inspect.getsource(item.function)
    return bool(_OTHER_WORDS.search(text)) and "LoraConfig" not in text


def _config_class(value: object) -> type | None:
    kind = value if inspect.isclass(value) else type(value)
    return kind if "Config" in kind.__name__ and hasattr(kind, "peft_type") else None


def everything_is_here() -> None:
    """Tells PEFT's tests that each model has been fetched before."""
    import tests.testing_utils as utils

    if not isinstance(utils._HUB_MODEL_ACCESSES, defaultdict):
        utils._HUB_MODEL_ACCESSES = _Everything()


class _Everything(defaultdict[str, int]):
    def __init__(self) -> None:
        super().__init__(lambda: 1)

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())
