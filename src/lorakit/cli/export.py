"""`lorakit export`: an adapter in the form that another program reads.

The forms, and which options each takes, are those of `lorakit.adapters.export.export_formats`.
"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.adapters.export.export_formats import FORMATS, ExportFormat
from lorakit.cli.shared_options import BaseOption
from lorakit.console import say_all


def _format(name: str) -> ExportFormat:
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, FORMATS))}.")
    return FORMATS[name]


def _takers(option: str) -> str:
    return ", ".join(form.name for form in FORMATS.values() if option in form.options)


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    to: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            parser=_format,
            metavar=f"[{'|'.join(FORMATS)}]",
            help="The program to export for.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A new folder; for gguf a new .gguf file.")
    ],
    base: BaseOption = None,
    merged: Annotated[
        bool, typer.Option("--merged", help=f"{_takers('merged')}: base + adapter as one model.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{_takers('dtype')}: float32, float16, bfloat16; when merged also q8_0, q6_k, "
            "q5_k_m, q4_k_m, q4_0."
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help=f"{_takers('system')}: the default system message."),
    ] = None,
) -> None:
    """Write an adapter for llama.cpp, Ollama, vLLM or mlx-lm.

    llama.cpp and Ollama read GGUF. ChatGLM's original code has a form too.
    """
    done = to.write(adapter, output, base, merged=merged, dtype=dtype, system=system)
    say_all((*done.summary.split("\n"), *done.notices, done.command), err=False)
