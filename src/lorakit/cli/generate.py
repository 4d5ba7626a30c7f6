"""`lorakit generate`: a file of prompts, answered by adapters and their base in one batch."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.shared_options import (
    BaseOption,
    ChatTemplateKwargsOption,
    DtypeOption,
    FetchImagesOption,
    QuantizationOption,
    SpeculativeConfigOption,
    WeightsOption,
    chat_template_kwargs,
)
from lorakit.console import say, say_all, say_json
from lorakit.progress import track


def generate(
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt file or - (stdin) with one prompt a line, or rows as for training."
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER | NAME=PATH]...", help="Adapters' folders; each answers every prompt."
        ),
    ] = None,
    model: BaseOption = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Answer with the bare base model too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A JSON Lines file. Default: standard output."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message for prompts without one.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0001, max=1)] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the k most likely tokens; 0 is all.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON schema (a file) that every answer follows.")
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="The batch size. Default: as many as fit into memory, at most 64."
        ),
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    weights: WeightsOption = None,
    speculative_config: SpeculativeConfigOption = None,
    template_kwargs: ChatTemplateKwargsOption = None,
    fetch_images: FetchImagesOption = False,
) -> None:
    """Answer a file of prompts with each adapter, as rows of JSON.

    One line for each answer, in the file's order.
    """
    from lorakit import atomic
    from lorakit.data.pictures import pictures_in
    from lorakit.data.prompts import read_prompts
    from lorakit.engine.adapter_names import named_adapters
    from lorakit.engine.answer_all import answer_all
    from lorakit.engine.grammar import Grammar
    from lorakit.engine.open_engine import open_engine, open_with
    from lorakit.engine.sampling import Sampling
    from lorakit.engine.speculation import NgramSpeculation
    from lorakit.errors import InputError

    named = named_adapters(adapters or [])
    if not named and model is None:
        raise InputError("nothing to answer with: give adapters' folders, or --model")
    speculation = NgramSpeculation.from_json(speculative_config) if speculative_config else None
    grammar = None if schema is None else Grammar.from_file(schema)
    sampling = Sampling(
        temperature,
        top_p,
        max_new_tokens,
        seed,
        top_k=top_k,
        stop=tuple(stop or ()),
        grammar=grammar,
    )
    variables, hidden = chat_template_kwargs(template_kwargs), Counter[str]()
    with pictures_in(fetch=fetch_images):
        asked = [prompt.opened_by(system) for prompt in read_prompts(prompts)]
    if len(named) == 1 and not with_base:
        ((name, folder),) = named.items()
        engine = open_with(
            model,
            name,
            folder,
            dtype=dtype,
            quantization=quantization,
            weights=weights,
            max_rows=max_rows,
            speculation=speculation,
        )
    else:
        engine = open_engine(
            model,
            named,
            dtype=dtype,
            quantization=quantization,
            weights=weights,
            max_rows=max_rows,
            speculation=speculation,
        )
    try:
        say_all(engine.notices)
        answering: list[str | None] = [info.name for info in engine.pool.infos()]
        if with_base or not answering:
            answering.append(None)
        for model_name in answering:
            engine.grammars.form(grammar, model_name)  # refused before anything is answered
        lines, tokens, began = [], 0, time.perf_counter()
        # Answers on the terminal show by themselves how far it is.
        shown = output is not None or not sys.stdout.isatty()
        whole = len(asked) * len(answering)
        answers = answer_all(engine, asked, answering, sampling, variables, hidden)
        for answered in track(answers, "answering", whole) if shown else answers:
            tokens += answered.new_tokens
            lines.append(json.dumps(answered.record(), ensure_ascii=False))
            if output is None:
                say_json(answered.record(), indent=None)
        seconds = time.perf_counter() - began
    finally:
        engine.close()
    if output is not None:
        atomic.write_file(output, "".join(f"{line}\n" for line in lines))
    for reason, number in hidden.items():
        say(f"{number} of {whole} prompts: {reason}", err=True)
    rate = f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} a second)"
    say(f"{len(lines)} answers, {rate}" + (f": {output}" if output else ""), err=True)
