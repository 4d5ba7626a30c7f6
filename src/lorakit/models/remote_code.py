"""Whether code that lies in a model's folder may run: not unless the user says so.

What says so is a variable of the environment, so that every process of a run agrees.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import InputError

OPTION = "--trust-remote-code"
VARIABLE = "LORAKIT_TRUST_REMOTE_CODE"


def trusted() -> bool:
    """Whether the user trusts it. transformers is told in any case: it would ask a person else."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@contextmanager
def needed_code_refused(folder: Path) -> Iterator[None]:
    """Makes one clear line of transformers' refusal to run what lies in `folder`.

    Raises:
        InputError: the model cannot be had without its own code.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"model: {folder} needs code of its own (*.py beside its weights), which is not run: "
            f"read it, and give {OPTION} if you trust it"
        ) from error
