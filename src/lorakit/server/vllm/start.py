"""Prints vLLM's command line, and becomes the process that it starts."""

from __future__ import annotations

import os
import shutil

from lorakit.console import say
from lorakit.errors import InputError, LorakitError
from lorakit.server.vllm.options import VllmOptions
from lorakit.server.vllm.plan import plan


def serve(options: VllmOptions, *, dry_run: bool = False) -> None:
    """Serves with vLLM: the entry point for `lorakit serve --engine vllm`.

    The notices and the command are printed, as a comment a notice and one line for a shell: with
    `dry_run` on stdout, and that is all; otherwise on stderr, and this process becomes vLLM's, so
    the call does not return. Model ids and routes are those of lorakit's own server: the adapters'
    names and the base's, `/v1/chat/completions`, `/v1/completions`, `/v1/models`,
    `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, `/health`, `/metrics`.

    Copies of adapters that vLLM would misread are written with `dry_run` too, as the command names
    them.

    Raises:
        InputError: vLLM is not installed here, cannot serve this, or an option is wrong.
        LorakitError: the system refuses to start it.
    """
    if not dry_run and shutil.which("vllm") is None:
        raise InputError(
            "there is no program vllm on the PATH: pip install vllm (on a machine with a GPU), or "
            "add --dry-run to see the command that would be started"
        )
    planned = plan(options)
    for line in [*(f"# {notice}" for notice in planned.notices), planned.shown()]:
        say(line, err=not dry_run)
    if not dry_run:
        try:
            os.execvpe(planned.command[0], planned.command, os.environ | planned.environment)
        except OSError as error:
            raise LorakitError(f"vllm cannot be started: {error.strerror or error}") from error
