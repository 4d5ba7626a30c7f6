"""`lorakit chat`: a conversation with an adapter in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.shared_options import (
    BaseOption,
    ChatTemplateKwargsOption,
    DtypeOption,
    QuantizationOption,
    chat_template_kwargs,
)
from lorakit.console import piped_lines, readable, say, say_all, write
from lorakit.folder_name import folder_name


def chat(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    base: BaseOption = None,
    system: Annotated[
        str | None, typer.Option(help="A system message for the conversation.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    template_kwargs: ChatTemplateKwargsOption = None,
) -> None:
    """Chat with an adapter; /help shows the commands. Reads a pipe too."""
    from lorakit.engine.conversation import ChatSession, run
    from lorakit.engine.open_engine import open_with
    from lorakit.engine.sampling import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    variables = chat_template_kwargs(template_kwargs)
    name = folder_name(adapter)
    engine = open_with(base, name, adapter, dtype=dtype, quantization=quantization, max_rows=1)
    try:
        say_all(engine.notices)
        answering = name if engine.pool.infos() else None  # else it is merged into the base
        session = ChatSession(engine, answering, sampling, system, variables)
        typed = sys.stdin.isatty()
        if typed:
            with suppress(ImportError):  # some builds of Python lack it
                import readline  # noqa: F401 (gives the prompt editing and history)
            say(f"{engine.model_name} with {adapter}. /help shows the commands.")
        run(session, _typed_lines() if typed else piped_lines(), write)
    finally:
        engine.close()


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield readable(input("> "))
        except EOFError:
            say()
            return
