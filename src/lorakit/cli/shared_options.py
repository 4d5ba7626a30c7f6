"""Options that several verbs have."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lorakit.errors import InputError
from lorakit.models.quantization.backend import by_type

BaseOption = Annotated[
    str | None, typer.Option(help="The base model, if not the one that the adapter names.")
]

DtypeOption = Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")]

QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help=f"{', '.join(by_type())} for the base while it is loaded, or none. Default: as the "
        "adapter was trained.",
    ),
]

WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="int8 or int4: rounds the base's weights to 8 or 4 bits, which a CPU reads faster.",
    ),
]

SpeculativeConfigOption = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        metavar="JSON",
        help="Draft answers from their prompts, as vLLM's "
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}.',
    ),
]

ChatTemplateKwargsOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help='Variables that the chat template reads, like {"enable_thinking": false}.',
    ),
]

FetchImagesOption = Annotated[
    bool,
    typer.Option(
        "--fetch-images",
        help="Fetch pictures that rows name by http(s) addresses, of public hosts.",
    ),
]


def chat_template_kwargs(text: str | None) -> dict[str, Any]:
    """The value of `--chat-template-kwargs`.

    Raises:
        InputError: it is no JSON object.
    """
    from lorakit.data import strict_json

    try:
        value = strict_json.parse(text or "{}")
    except ValueError as error:
        raise InputError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError('--chat-template-kwargs takes an object like {"enable_thinking": false}')
    return value


def numbers(option: str, text: str) -> list[float]:
    """The value of an option that takes numbers with commas between, as 1.0,0.5.

    Raises:
        InputError: it is something else.
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option}: {text!r} must be comma-separated numbers, as 1.0,0.5"
        ) from error


def rows_to_compare(data: str | None, limit: int | None, base: str | None) -> list[Any]:
    """The samples of `--data`; none without it.

    Raises:
        InputError: they cannot be read, or an option is given that is for them alone.
    """
    if data is None:
        if limit is not None or base is not None:
            raise InputError("--limit and --base are for --data, which is not given")
        return []
    from lorakit.data.dataset import load_samples

    return load_samples(data, None, limit)


def column_names(text: str) -> dict[str, str]:
    """The value of `--columns`: `prompt=mr,completion=ref`.

    Raises:
        InputError: a part of it is something else.
    """
    mapping = {}
    for part in text.split(","):
        ours, equals, theirs = part.partition("=")
        if not equals:
            raise InputError(f"--columns: '{part}' is not NAME=COLUMN (as in prompt=mr)")
        mapping[ours.strip()] = theirs.strip()
    return mapping


def reward_specs(names: Sequence[str]) -> list[Any]:
    """The rewards that a command line names; of a file alone, all its reward functions.

    It runs a file whose functions are asked for.

    Raises:
        InputError: one cannot be read.
    """
    from lorakit.rewards.rewards import functions_of
    from lorakit.training.yaml_file import parse_yaml

    found: list[Any] = []
    for one in names:
        if one.lstrip().startswith("{"):
            try:
                found.append(parse_yaml(one))
            except ValueError as error:
                raise InputError(f"{one}: cannot be read: {error}") from error
        elif one.endswith(".py"):
            found += functions_of(one)
        else:
            found.append(one)
    return found
