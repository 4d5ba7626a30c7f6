"""Tables on the terminal: the verbs that look at adapters show their numbers alike."""

from collections.abc import Iterable

from lorakit.console import open_console, visible


def print_table(title: str, headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Prints a table: the first column is text on the left, the others are numbers.

    Into a pipe it is as wide as its content, so that nothing is cut.
    """
    from rich.table import Table

    table = Table(title=visible(title) or None, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(visible(heading), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(visible, row))
    console = open_console()
    if not console.is_terminal:
        unlimited = console.options.update(max_width=10_000)
        console.width = max(80, console.measure(table, options=unlimited).maximum)
    console.print(table)


def printable(text: str) -> str:
    """`text` with control characters, which could act on a terminal, as what they are."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def spread(values: Iterable[float], form: str = "{:g}") -> str:
    """`8`, or `4 to 16` where values differ; `-` where there are none."""
    all_values = list(values)
    if not all_values:
        return "-"
    low, high = form.format(min(all_values)), form.format(max(all_values))
    return low if low == high else f"{low} to {high}"
