"""Continued pretraining: every token of documents of any length, in windows of `data.max_length`.

A document that is longer than a window is divided and nothing of it is lost. Documents end with the
end-of-sequence token and never see each other, however they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lorakit.data.text_files import SampleBy
from lorakit.data.too_long import Limit
from lorakit.errors import InputError, count
from lorakit.models.load import positions_of
from lorakit.objectives import settings as kinds
from lorakit.objectives.sft import Sft

if TYPE_CHECKING:
    from lorakit.data.dataset import PreparedData
    from lorakit.data.masking import TokenizedRow
    from lorakit.data.too_long import TooLong
    from lorakit.models.load import LoadedModel
    from lorakit.objectives.run_request import RunRequest


class Pretrain(Sft):
    """The cross-entropy of all tokens of plain text, -log p(x_t | x_<t) within a window."""

    name = "pretrain"
    unit = "token"
    row_kinds = ("text", "document")
    templated = False
    epochs: ClassVar[Sequence[tuple[int, int]]] = ()
    too_long: ClassVar[TooLong] = "split"
    row_settings: ClassVar[Sequence[str]] = ("sample_by", "overlap")

    class Settings(kinds.Settings):
        """How documents are found and divided.

        Attributes:
            sample_by: what a document of a `.txt` or `.md` file is (the name and values of the
                library `datasets`); `auto` looks at each file.
            overlap: the tokens that a window repeats of the one before; they are read and not
                learned again.
        """

        sample_by: SampleBy = "auto"
        overlap: Annotated[int, Field(ge=1)] = 1

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sample_by, self.overlap = self.settings.sample_by, self.settings.overlap

    def as_learned(self, sample: Any) -> Any:
        """All of a text."""
        return sample

    def read(self, request: RunRequest, loaded: LoadedModel) -> PreparedData:
        """The windows of all documents.

        Raises:
            InputError: the rows cannot be used, or a window is no longer than the overlap.
        """
        tokens = Limit(request.max_length, positions_of(loaded.model)).tokens
        if self.overlap >= tokens:
            raise InputError(
                f"objective.overlap is {self.overlap} and a window {tokens} tokens "
                "(data.max_length, or what the model reads): it must be smaller"
            )
        return super().read(request, loaded)

    def notices(self, rows: Sequence[TokenizedRow]) -> list[str]:
        """How many documents, windows and tokens there are to learn from."""
        documents = len({row.where for row in rows})
        learned, whole = sum(row.supervised for row in rows), sum(map(len, rows))
        return [
            f"{count(documents, 'document')} to learn from in {count(len(rows), 'window')}: "
            f"{learned:,} tokens are learned, {whole - learned:,} only read (the first of a "
            "document, and what windows overlap)"
        ]
