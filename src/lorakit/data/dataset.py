"""A recipe's data section to rows ready for training: read, check, split, tokenize, count.

What the user should know but need not act on comes back: what was chosen (a template, the eval
share) as `notices`, what was found in the rows as `findings`; printing is left to the caller.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.data.checks import RowStatistics, findings, statistics
from lorakit.data.findings import AnySample, Finding
from lorakit.data.formats import SUPERVISED, to_sample
from lorakit.data.masking import TokenizedRow, encode, label, read
from lorakit.data.mixing import (
    DataFacts,
    Sources,
    load_samples,
    mix,
    notice_of_own,
)
from lorakit.data.pictures import pictures_in, reachable
from lorakit.data.preference_checks import findings_of_preferences, preference_figures
from lorakit.data.samples import Sample
from lorakit.data.sources import Row, read_source
from lorakit.data.splits import HELD_OUT, held_out, shuffled_groups
from lorakit.data.streaming import RowStream, first_rows, open_stream
from lorakit.data.templates import ensure_template
from lorakit.data.text_files import SampleBy
from lorakit.data.texts import findings_of_fields, findings_of_texts
from lorakit.data.too_long import WHOLE, Limit, TooLong, fit, fitting
from lorakit.errors import InputError, count, each
from lorakit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataFacts", "PreparedData", "load_samples", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """Rows for training and evaluation; `train[i]` is the tokenized `train_samples[i]`.

    A row whose source weighs more than 1 stands in `train` more than once. Where there is a
    `stream`, it has the rows to learn from, and `train` the first of them.
    """

    train: Sequence[TokenizedRow]
    eval: Sequence[TokenizedRow]
    train_samples: Sequence[AnySample]
    eval_samples: Sequence[AnySample]
    facts: list[DataFacts]
    notices: list[str]
    findings: list[Finding]
    stream: RowStream | None = None

    def statistics(self) -> dict[str, RowStatistics]:
        """The numbers of both parts, of those that have rows."""
        parts = {
            "train": (self.train_samples, self.train),
            "eval": (self.eval_samples, self.eval),
        }
        return {
            name: replace(statistics(samples, rows), preferences=preference_figures(rows))
            for name, (samples, rows) in parts.items()
            if rows
        }


def prepare(
    tokenizer: "PreTrainedTokenizerBase",
    train: Sources,
    eval: float | Sources = 0.1,
    *,
    max_length: int = 1024,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 42,
    to_row: Callable[[Sample, "PreTrainedTokenizerBase", int], TokenizedRow] | None = None,
    kinds: Collection[str] = SUPERVISED,
    templated: bool = True,
    too_long: TooLong = "cut",
    positions: int | None = None,
    complete: Callable[[Sequence[Any], bool], Sequence[Any]] = lambda samples, held_out: samples,
    sample_by: SampleBy = "auto",
    overlap: int = 1,
    as_learned: Callable[[Any], Any] = lambda sample: sample,
    buffer_size: int | None = None,
    keeps_columns: bool = False,
) -> PreparedData:
    """Read, split and tokenize the data of a recipe.

    Args:
        tokenizer: a fast tokenizer; a plain chat template is set on it if it needs one.
        train: the source to learn from, or several of them, with weights.
        eval: the share of the training rows to hold out, `0 <= eval < 1`, or sources of their own.
            Where `train` is a data set with a part for validation, a share stands for that part.
            Rows with the same prompt are held out together, so that no prompt is seen in both.
            Weights do not count here: a row is held out once.
        max_length: tokens; what becomes of longer rows `too_long` says, and they are counted.
        columns: maps a format's column names to the files' own.
        limit: use only the first rows of each source, for a quick trial.
        seed: of the split, and of the rows that a weight draws.
        to_row: makes a row of a sample, with at most `max_length` tokens; None for rows that a
            causal model learns.
        kinds: of rows that the objective takes, as in `mix`.
        templated: conversations become text by the chat template.
        positions: the most tokens that the model reads, where it says so.
        complete: makes what the samples of a part lack; called with whether it is held out.
        sample_by: what a document of a plain text file is, as in `data.text_files`.
        overlap: of the parts of a long text, as in `data.too_long.divided`.
        as_learned: makes of a row's sample what is learned of it, as in `mix`.
        buffer_size: read the rows to learn from as they come, and shuffle them within so many.
        keeps_columns: samples keep the columns of their rows, as in `mix`.

    Raises:
        InputError: anything in the files or these values that cannot be used.
    """
    if max_length < 2:
        raise InputError(f"data.max_length is {max_length}; a row needs at least 2 tokens")
    most = Limit(max_length, positions)
    streams = buffer_size is not None
    shared: dict[str, Any] = {"kinds": kinds, "sample_by": sample_by, "as_learned": as_learned}
    shared["keeps_columns"] = keeps_columns
    source = first_rows if streams else read_source
    learned = mix(train, columns, limit, seed=seed, read=source, **shared)
    facts, notices = learned.facts, learned.notices
    if streams:
        facts = [replace(fact, rows=0) for fact in facts]
        notices.append(
            f"rows are read as they come, shuffled within {buffer_size:,}; counts, statistics and "
            f"findings cover only the first {count(len(learned.samples), 'row')}"
        )
    if isinstance(eval, (int, float)) and eval and learned.held_out:
        notices.append(notice_of_own(learned.held_out))
        eval = learned.held_out
    if isinstance(eval, (int, float)):
        kept, held, said = _split(learned.samples, eval, seed, learned.name)
        notices += said
    else:
        measured = mix(eval, columns, limit, seed=seed, key="data.eval", wanted=HELD_OUT, **shared)
        kept, held = learned.samples, measured.samples
        facts += measured.facts
        notices += measured.notices

    def make(length: int) -> list[TokenizedRow]:
        if to_row is not None:
            given = track(everything, "tokenizing rows")
            return each(given, lambda sample: to_row(sample, tokenizer, length))
        given = track(everything, "rendering rows")
        readings = each(given, lambda sample: read(sample, tokenizer))
        return each(
            track(
                zip(readings, encode(readings, tokenizer), strict=True),
                "tokenizing rows",
                len(readings),
            ),
            lambda pair: label(*pair, tokenizer, length),
        )

    pictures = reachable()

    def parts_of(
        row: Row, names: Mapping[str, str]
    ) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
        with pictures_in(pictures.folder, pictures.fetch):  # rows of a stream are read later
            sample = as_learned(to_sample(row, names, kinds))
        length = WHOLE if too_long == "split" else most.tokens
        if to_row is not None:
            made = to_row(sample, tokenizer, length)
        else:
            reading = read(sample, tokenizer)
            made = label(reading, next(encode([reading], tokenizer)), tokenizer, length)
        return fitting(made, most, too_long, overlap)

    if templated and any(sample.messages for sample in (*kept, *held)):
        notices += [notice] if (notice := ensure_template(tokenizer)) else []
    kept, held = [*complete(kept, False)], [*complete(held, True)]
    everything: Sequence[Sample] = kept + held
    fitted = fit(kept, held, make, most, too_long, overlap)
    notices += fitted.notices
    found = findings(fitted.train, fitted.eval, tokenizer, most, fitted.left_out)
    found += findings_of_preferences(fitted.train, fitted.eval, fitted.left_out, most)
    found += findings_of_texts(everything, tokenizer)
    found += findings_of_fields(everything, tokenizer, by_template=templated)
    copied = [pair for pair in fitted.train for _ in range(pair[0].copies)]
    return PreparedData(
        [row for _, row in copied],
        [row for _, row in fitted.eval],
        [sample for sample, _ in copied],
        [sample for sample, _ in fitted.eval],
        facts,
        notices,
        found,
        open_stream(train, columns, limit, seed, buffer_size, parts_of) if buffer_size else None,
    )


def _split(
    samples: list[Sample], share: float, seed: int, path: str
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples, held-out samples, and a notice about the share."""
    if isinstance(share, bool) or not 0 <= share < 1:
        raise InputError(f"data.eval is {share}; give a share from 0 to below 1, or a path")
    if share == 0:
        return samples, [], []
    groups = shuffled_groups([sample.prompt_key for sample in samples], seed)
    if len(groups) < 2:
        raise InputError(
            f"data.eval: {path} has {count(len(samples), 'row')} with one prompt, so no share of "
            "it can be held out without leaking; add rows, give a file, or set data.eval to 0"
        )
    smallest = min(groups, key=len)
    chosen = held_out(groups, share) or set(smallest)
    prompts = sum(group[0] in chosen for group in groups)
    notice = (
        f"eval: {len(chosen)} of {count(len(samples), 'row')} held out "
        f"({count(prompts, 'prompt')} that training does not see, seed {seed})"
    )
    kept = [sample for i, sample in enumerate(samples) if i not in chosen]
    return kept, [samples[i] for i in sorted(chosen)], [notice]
