"""Imports the files and modules that hold reward functions, and finds the functions in them.

It is what runs a user's code: in a process of its own (`reward_worker`), and only for what the
user named.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit.errors import did_you_mean, listed
from lorakit.rewards.calling import described
from lorakit.rewards.reward_arguments import parameters

_TELLING = ("completions", "completion_ids")
"""Parameters that a reward function has, one of them at least."""


class RewardLoadError(Exception):
    """What a user's file or module lacks, or raises when it is imported."""


def load_file(path: str) -> ModuleType:
    """The module in a file, with the other modules of its folder in reach.

    A file of a package is imported as its module, so that relative imports work.

    Raises:
        RewardLoadError: it cannot be imported.
    """
    file = Path(path).resolve()
    folder, inside = file.parent, [file.stem]
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        inside.insert(0, folder.name)
        folder = folder.parent
    for place in dict.fromkeys((str(file.parent), str(folder))):
        if place not in sys.path:
            sys.path.insert(0, place)
    if len(inside) > 1 and file.stem.isidentifier():
        return load_module(".".join(inside))
    name = file.stem if file.stem.isidentifier() and file.stem not in sys.modules else "_rewards"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardLoadError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise RewardLoadError(f"it cannot be imported: {_why(error)}") from error
    return module


def load_module(name: str) -> ModuleType:
    """An installed module, or one of the present folder.

    Raises:
        RewardLoadError: it cannot be imported.
    """
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(name)
    except BaseException as error:
        raise RewardLoadError(f"it cannot be imported: {_why(error)}") from error


def _why(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({Path(error.filename or '').name}, line {error.lineno})"
    return described(error)


def find_function(
    module: ModuleType, attribute: str, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """The reward function of this name, with its settings.

    A class is called with the settings and its object is the function; a function gets them as
    keyword arguments in each call. Without a name it is the only one in the file.

    Raises:
        RewardLoadError: there is none, or the settings do not fit.
    """
    found = reward_functions(module)
    if not attribute:
        if len(found) != 1:
            raise RewardLoadError(
                f"say which function, as in {Path(module.__file__ or '').name}:NAME: it has "
                f"{listed(found) or 'none with a parameter completions'}"
            )
        (attribute,) = found
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = found or [name for name in vars(module) if not name.startswith("_")]
            raise RewardLoadError(
                f"it has no {attribute}{did_you_mean(attribute, known)}; reward functions in it: "
                f"{listed(found) or 'none'}"
            )
        value = getattr(value, part)
    if inspect.isclass(value):
        try:
            value = value(**settings)
        except Exception as error:
            raise RewardLoadError(f"{attribute}({_shown(settings)}): {described(error)}") from error
        settings = {}
    if not callable(value):
        raise RewardLoadError(f"{attribute} is a {type(value).__name__}, no function")
    takes, everything = parameters(value)
    if unknown := [name for name in settings if name not in takes and not everything]:
        raise RewardLoadError(
            f"{attribute} has no parameter {unknown[0]}{did_you_mean(unknown[0], takes)}"
        )
    return functools.partial(value, **settings) if settings else value


def reward_functions(module: ModuleType) -> list[str]:
    """The names of a module's own reward functions, in their order."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or not callable(value) or inspect.ismodule(value):
            continue
        if inspect.isfunction(value) and value.__module__ != module.__name__:
            continue  # imported from elsewhere
        if inspect.isclass(value):
            if value.__module__ != module.__name__ or "__call__" not in vars(value):
                continue
            value = value.__call__
        if any(name in parameters(value)[0] for name in _TELLING):
            found.append(name)
    return found


def hashes(module: ModuleType) -> dict[str, str]:
    """SHA-256 of the module's file and of the modules beside it that it has imported, by name."""
    if not module.__file__:
        return {}
    folder = Path(module.__file__).resolve().parent
    files = {module.__file__}
    for other in list(sys.modules.values()):
        file = getattr(other, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        # torch.classes has the name of a file that is nowhere.
        if Path(file).resolve().parent == folder and Path(file).is_file():
            files.add(file)
    return {
        Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for file in sorted(files)
    }


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
