"""`lorakit export`: an adapter in the form that another program reads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorakit.commands import quoted
from lorakit.console import say
from lorakit.errors import InputError


class Target(StrEnum):
    """The programs that are known."""

    GGUF = "gguf"
    OLLAMA = "ollama"
    VLLM = "vllm"
    MLX = "mlx"
    CHATGLM = "chatglm"


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    to: Annotated[Target, typer.Option("--to", help="What for.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A new folder; for gguf a new .gguf file.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base model, when it is not the recorded one.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="gguf, ollama: base + adapter as one model.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="gguf, ollama: float32, float16, bfloat16; q8_0 when merged."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="ollama: the system message where there is none.")
    ] = None,
) -> None:
    """Write an adapter for llama.cpp, Ollama, vLLM or mlx-lm.

    llama.cpp and Ollama read GGUF. ChatGLM's original code has a form too.
    """
    _refuse_idle(to, merged, dtype, system)
    if to is Target.GGUF:
        from lorakit.adapters.export.gguf_adapter import export_gguf_adapter
        from lorakit.adapters.export.gguf_model import export_gguf_model

        if merged:
            file = export_gguf_model(adapter, output, base=base, dtype=dtype or "float16")
        else:
            file = export_gguf_adapter(adapter, output, base=base, dtype=dtype or "float32")
        what = "model" if merged else "adapter"
        say(
            f"GGUF {what}: {file.output} ({file.architecture}, {file.tensors} tensors, "
            f"{file.dtype}, {file.bytes / 1e6:.1f} MB)"
        )
        notices = file.notices
        written = quoted(file.output)
        option = f"-m {written}" if merged else f"-m BASE.gguf --lora {written}"
        if file.template:
            option += f" --jinja --chat-template-file {quoted(file.template)}"
        command = f"llama-cli {option}"
    elif to is Target.OLLAMA:
        from lorakit.adapters.export.ollama import export_ollama

        folder = export_ollama(
            adapter, output, base=base, merged=merged, dtype=dtype, system=system
        )
        say(f"for Ollama: {folder.output} ({', '.join(folder.files)})")
        say(f"the chat template is of the family {folder.family}, and was compared with it")
        notices, command = folder.notices, folder.command
    elif to is Target.VLLM:
        from lorakit.adapters.export.vllm import export_vllm

        copy = export_vllm(adapter, output, base=base)
        say(f"for vLLM: {copy.output} ({copy.modules} modules, rank {copy.r}, scaling 1)")
        notices, command = copy.notices, copy.command
    elif to is Target.CHATGLM:
        from lorakit.adapters.export.chatglm import export_chatglm

        named = export_chatglm(adapter, output, base=base)
        ranks = ", ".join(f"{count} of rank {r}" for r, count in named.ranks.items())
        say(f"for ChatGLM's original code: {named.output} ({named.modules} modules: {ranks})")
        notices, command = named.notices, named.command
    else:
        from lorakit.adapters.export.mlx import export_mlx

        files = export_mlx(adapter, output, base=base)
        say(
            f"for mlx-lm: {files.output} "
            f"({files.modules} modules, rank {files.r}, scale {files.scale:g})"
        )
        notices, command = files.notices, files.command
    for notice in notices:
        say(notice)
    say(command)


def _refuse_idle(to: Target, merged: bool, dtype: str | None, system: str | None) -> None:
    """Raises InputError for an option that would have no effect."""
    files = to in (Target.GGUF, Target.OLLAMA)
    for option, given, used in (
        ("--merged", merged, files),
        ("--dtype", dtype is not None, files),
        ("--system", system is not None, to is Target.OLLAMA),
    ):
        if given and not used:
            raise InputError(f"{option} has no effect with --to {to}: leave it out")
