"""YAML as people expect it, from a recipe's file or an override: small, plain, and no key twice.

What the values may be is decided in `lorakit.training.recipe`.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import InputError, did_you_mean

_LARGEST_FILE = 64 * 1024
_MOST_VALUES = 10_000
"""Values that a recipe may hold, counted as often as aliases repeat them."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: there is no such file, or it holds something else; it names the line.
    """
    try:
        text = _read_text(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; check the path") from error
    try:
        values = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: a recipe is a mapping of keys; write model: …, data: …, output_dir: …"
        )
    return values


def parse_yaml(text: str) -> Any:
    """The value that `text` holds; None for nothing. Raises InputError, with the line."""
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise InputError(
                f"holds more than {_MOST_VALUES:,} values, or an alias inside itself; "
                "write out what its aliases (*name) repeat, and rows into a data file"
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {_problem(error)}") from error
    except RecursionError as error:
        raise InputError("not valid YAML: nested too deeply; write a recipe flat") from error
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # impossible dates, tags, …
        raise InputError(f"not valid YAML: {error}; put the value in quotes") from error
    finally:
        loader.dispose()


def _read_text(path: Path) -> str:
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"the recipe {path} is a folder; name a file in it")
        if path.exists():
            raise InputError(f"the recipe {path} is a pipe or device; save it to a file first")
        if path.is_symlink():
            raise InputError(f"the recipe {path} is a broken symbolic link; repair it")
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"the recipe {path} does not exist{did_you_mean(path.name, siblings)}")
    if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz"):
        raise InputError(f"{path} is data and not a recipe: give it with --data, or as data.train")
    if path.stat().st_size > _LARGEST_FILE:
        raise InputError(
            f"{path} is larger than {_LARGEST_FILE >> 10} KiB, which no recipe is: data is given "
            "with --data, or as data.train"
        )
    return path.read_text(encoding="utf-8-sig")


class _Loader(yaml.SafeLoader):
    """`1e-4` is a number, and no key occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise InputError(f"line {line}: the key '{key}' occurs twice; remove one")
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a node has with all aliases written out; no end counts as too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # what an alias inside itself finds
        inner = node.value if isinstance(node, yaml.SequenceNode) else sum(node.value, ())
        known[id(node)] = 1 + sum(_values(child, known) for child in inner)
    return known[id(node)]


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        character = f"{error.character:#06x}" if isinstance(error.character, int) else "?"
        return f"the character {character} at {error.position + 1}: {error.reason}; remove it"
    mark = getattr(error, "problem_mark", None)
    at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{at}{getattr(error, 'problem', None) or 'not valid'}; repair it there"
