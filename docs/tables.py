"""Writes the tables of other-names.md and training-arguments.md anew: `python docs/tables.py`.

Their rows are those of `lorakit/training/*.toml`; what stands above a table stays as it is.
"""

from pathlib import Path

from lorakit.training.arguments import ARGUMENTS
from lorakit.training.recipe_errors import OTHER_NAMES

_RULE = "| --- |\n"


def pages() -> dict[Path, str]:
    """What the pages should hold, by path."""
    names = []
    for name, hint in sorted(OTHER_NAMES.items()):
        key, space, note = hint.partition(" (")
        here = hint[3:] if hint.startswith("-: ") else f"`{key}`{space}{note}"
        names.append(f"| `{name}` | {here} |")
    arguments = [
        f"| `{name}` | {argument.treatment} | {argument.note} |"
        for name, argument in sorted(ARGUMENTS.items())
    ]
    found = {}
    for file, rows in (("other-names.md", names), ("training-arguments.md", arguments)):
        path = Path(__file__).with_name(file)
        head, rule, _ = path.read_text(encoding="utf-8").partition(_RULE)
        found[path] = head + rule + "\n".join(rows) + "\n"
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
