"""Files to download that only the holder of a key can read, by age (https://age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import InputError

SUFFIX = ".age"


def recipients_of(keys: Sequence[str]) -> list[Any]:
    """What files are encrypted to: native `age1…` keys, or public keys of SSH.

    Raises:
        InputError: a key is neither, or pyrage is not installed.
    """
    if not keys:
        return []
    try:
        import pyrage
    except ModuleNotFoundError as error:
        raise InputError(
            "age_encryption_recipients needs pyrage where the server runs: pip install pyrage"
        ) from error
    found = []
    for key in keys:
        kind = pyrage.x25519 if key.startswith("age1") else pyrage.ssh
        try:
            found.append(kind.Recipient.from_str(key))
        except Exception as error:
            raise InputError(
                f"age_encryption_recipients: {key[:20]!r} is neither an age1… key nor a public key "
                "of SSH"
            ) from error
    return found


def encrypt_files(folder: Path, recipients: Sequence[Any]) -> None:
    """Replaces each file in a folder by one with `.age` behind its name."""
    import pyrage

    for file in [file for file in folder.iterdir() if file.is_file()]:
        pyrage.encrypt_file(str(file), f"{file}{SUFFIX}", list(recipients))
        file.unlink()
