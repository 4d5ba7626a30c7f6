"""Finds names that tests and benchmarks import from files of this project that do not have them.

`python tests/imported_names.py` takes three seconds; collecting all tests takes half a minute.
"""

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), file)


@cache
def defined(file: Path) -> frozenset[str]:
    """Every name that is bound somewhere in a file."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(name.asname or name.name).partition(".")[0] for name in node.names}
    return frozenset(found)


@cache
def place_of(module: str, beside: Path) -> Path | None:
    """The file or folder of a module, looked for as pytest does; None for that of a package."""
    for folder in (beside, ROOT / "tests", ROOT / "src", ROOT):
        path = folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py", path):
            if file.exists():
                return file
    return None


def missing(file: Path) -> list[str]:
    """A line for each name that `file` imports in vain."""
    found = []
    for node in ast.walk(parsed(file)):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.level:
            continue
        source = place_of(node.module, file.parent)
        if source is None:
            if node.module.partition(".")[0] in ("lorakit", "benchmarks"):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: no module {node.module}")
            continue
        known = frozenset[str]() if source.is_dir() else defined(source)
        for name in node.names:
            is_module = place_of(f"{node.module}.{name.name}", file.parent) is not None
            if name.name not in known and not is_module and "__getattr__" not in known:
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                found.append(f"{where}: {node.module} has no {name.name}")
    return found


if __name__ == "__main__":
    folders = (ROOT / "tests", ROOT / "benchmarks")
    lines = [line for folder in folders for file in folder.rglob("*.py") for line in missing(file)]
    print("\n".join(lines) or "All names that tests import are there.")
    sys.exit(bool(lines))
