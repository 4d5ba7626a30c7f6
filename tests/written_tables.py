"""Tables that documents have of what tests found; `LORAKIT_WRITE_TABLES=1` writes them anew."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WRITING = bool(os.environ.get("LORAKIT_WRITE_TABLES"))
ANEW = "write it anew with LORAKIT_WRITE_TABLES=1"


@dataclass(frozen=True)
class WrittenTable:
    """The table between two marks of a document."""

    document: Path
    begin: str
    end: str

    def lines(self) -> list[str]:
        """Its lines that are rows, with headings and rule."""
        return [line for line in self._parts()[1].splitlines() if line.startswith("| ")]

    def write(self, lines: Sequence[str]) -> None:
        before, _, after = self._parts()
        text = before + self.begin + self._inner(lines) + self.end + after
        self.document.write_text(text, encoding="utf-8")

    def is_made_of(self, lines: Sequence[str]) -> None:
        """Asserts that it is, or writes it."""
        if WRITING:
            self.write(lines)
        else:
            assert self._parts()[1] == self._inner(lines), ANEW

    @staticmethod
    def _inner(lines: Sequence[str]) -> str:
        return "\n".join(["", "", *lines, "", ""])

    def _parts(self) -> tuple[str, str, str]:
        before, begin, rest = self.document.read_text(encoding="utf-8").partition(self.begin)
        written, end, after = rest.partition(self.end)
        assert begin, f"{self.document} has lost its marks"
        assert end, f"{self.document} has lost its marks"
        return before, written, after
