"""`lorakit report`: an adapter's run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import say, say_all


def report(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The HTML file. Default: report.html in the adapter's folder."
        ),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the report in the browser.")
    ] = False,
) -> None:
    """Write an adapter's run as one HTML page.

    The page needs no other file and no network.
    """
    from lorakit.report.run_page import write_report

    written = write_report(adapter, output)
    say_all(written.notices)
    say(f"report: {written.path}")
    if open_page:
        import webbrowser

        if not webbrowser.open(written.path.resolve().as_uri()):
            say("there is no browser to open it with: open the file yourself", err=True)
