"""Options that several verbs have."""

from typing import Annotated

import typer

QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="nf4, fp4 or int8 for the base while it is loaded, or none. Default: as the adapter "
        "was trained.",
    ),
]
