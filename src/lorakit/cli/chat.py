"""`lorakit chat`: a conversation with an adapter in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def chat(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, when it is not the recorded one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="For sampling.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
) -> None:
    """Chat with an adapter; /help shows the commands. Reads a pipe too."""
    from lorakit.adapters.open import open_adapter
    from lorakit.errors import InputError
    from lorakit.inference.chat import ChatSession, Sampling, run

    opened = open_adapter(adapter, base=base, dtype=dtype)
    if opened.task_type != "CAUSAL_LM":
        raise InputError(
            f"{adapter} is for {opened.task_type} and cannot chat: score it with lorakit eval"
        )
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = ChatSession(opened.model, opened.tokenizer, sampling, system)
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401 (gives the prompt editing and history)
        typer.echo(f"{opened.base_model} with {adapter}. /help shows the commands.")
    run(session, _typed_lines() if typed else sys.stdin, _write)


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
