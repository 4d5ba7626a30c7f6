"""Where lm-evaluation-harness's own tasks are described, found without parsing all of their files.

The harness parses 14,000 YAML files before it knows one name, which takes half a minute. Names,
groups and tags stand at the beginning of lines there, so they are found in the files' text; then
only the files that are asked for are parsed, by the harness itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

_KEY = re.compile(
    rb"""^["']?(task|group|tag|include|class)["']?[ ]*:[ \t]*   # a key of the file itself
    (?:["']?([^\s"'\[\]#,]+)["']?[ \t]*(?:\#.*)?\r?$   # one value
    |\[([^\]]*)\]                                      # a list on a line
    |\r?\n((?:[ \t]*-[ \t]*[^\n]*\n?)+))?              # or below it
    """,
    re.MULTILINE | re.VERBOSE,
)
_ENTRY = re.compile(rb"^[ \t]*-[ \t]*[\"']?([^\s\"'#:]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)


class HarnessIndex:
    """The tasks, groups and tags of a folder of YAML files.

    Args:
        root: the folder; by default lm-evaluation-harness's own tasks.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            import lm_eval.tasks

            root = Path(lm_eval.tasks.__file__).parent
        self._root = root

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The files of each name: a task's or group's own, a tag's those that have it."""
        own: dict[str, list[Path]] = {}
        tags: dict[str, list[Path]] = {}
        for path in sorted(self._root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
            keys = self._keys(path)
            # As the harness has it: a task of Python code may name a group, and is none.
            is_group = "group" in keys and "class" not in keys
            name = next(iter(keys.get("group" if is_group else "task", [])), None)
            if name is None:
                continue
            own.setdefault(name, []).append(path)
            for tag in () if is_group else self._tags(path):
                tags.setdefault(tag, []).append(path)
        return {name: own.get(name, []) + tags.get(name, []) for name in {**own, **tags}}

    def matching(self, pattern: str) -> list[str]:
        """The names that a pattern such as `mmlu_*` means, sorted."""
        return sorted(name for name in self.files if fnmatchcase(name, pattern))

    def add(self, names: Iterable[str], index: dict[str, Any]) -> None:
        """Has the harness read the files of these names, and of all that their groups are made of.

        Args:
            index: the harness's own (`TaskManager.task_index`), which gets their entries.
        """
        from lm_eval.tasks._index import TaskIndex
        from lm_eval.tasks._yaml_loader import load_yaml

        wanted, done, read = [*names], set[str](), set[Path]()
        while wanted:
            name = wanted.pop()
            if name in done:
                continue
            done.add(name)
            for path in self.files.get(name, []):
                if path in read:
                    continue
                read.add(path)
                config = load_yaml(path, resolve_func=False)
                TaskIndex.process_cfg(config, path, index)
                if "group" in config:
                    wanted += members_of(config.get("task"))

    @cached_property
    def _texts(self) -> dict[Path, dict[str, list[str]]]:
        return {}

    def _keys(self, path: Path) -> dict[str, list[str]]:
        """What a file says of itself: its values by their keys."""
        if path not in self._texts:
            found: dict[str, list[str]] = {}
            try:
                text = path.read_bytes()
            except OSError:
                text = b""
            for key, one, inline, below in _KEY.findall(text):
                values = [one] if one else re.findall(rb"[^\s,\"']+", inline)
                values += _ENTRY.findall(below)
                found[key.decode()] = [value.decode(errors="replace") for value in values]
            self._texts[path] = found
        return self._texts[path]

    def _tags(self, path: Path, depth: int = 0) -> list[str]:
        """The tags of a file, or of the file that it includes."""
        keys = self._keys(path)
        if "tag" in keys or depth > 8:
            return keys.get("tag", [])
        included = keys.get("include", [])
        return [tag for one in included for tag in self._tags(path.parent / one, depth + 1)]


def members_of(given: Any) -> Iterator[str]:
    """The names in a group's list, however deep."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list):
        for one in given:
            yield from members_of(one)
    elif isinstance(given, dict):
        yield from members_of(given.get("group"))
        yield from members_of(given.get("task"))
