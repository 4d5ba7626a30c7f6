"""Answers of one model to many prompts in this thread: no queue, and no adapters to choose from.

`write_rows` is the loop; `Sampler` is it for a model whose adapters are already in force, such as
the student of a distillation at a step of its training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.picture_rows import RowPictures
from lorakit.data.samples import Sample
from lorakit.engine.batch import Batch
from lorakit.engine.carried import Carried, how_carried
from lorakit.engine.prefix_cache import PrefixCache, prefixes_of
from lorakit.engine.requests import Ticket, context_length_of
from lorakit.engine.rows import AnswerRow
from lorakit.engine.rows_at_once import FEW_ROWS, MAX_ROWS, RowMemory
from lorakit.engine.sampling import Sampling, ending, prompt_tokens
from lorakit.errors import InputError, LorakitError
from lorakit.lora.joining import pack_adapter
from lorakit.lora.model import LoraModel
from lorakit.lora.packed import same_inputs
from lorakit.lora.routing import BASE, Route, Routing
from lorakit.models.fused import not_fused
from lorakit.models.loaded import in_evaluation
from lorakit.objectives.forward import TEACHER
from lorakit.progress import Task, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKS_FROM = 16
"""Tokens of an answer from which on packing factors saves more than it takes."""


NextRows = Callable[[Sequence[AnswerRow], bool], Iterable[AnswerRow]]
"""Gives rows that are to be written too, by those that the last step has finished, and whether
none is left but for them."""


def write_as_they_come(batch: Batch, routing: Routing, next_rows: NextRows) -> None:
    """Writes rows to their ends, as many at once as the batch has room for.

    Args:
        next_rows: asked before each step. It is over when no row is left and it gives none.
    """
    waiting, writing = deque[AnswerRow](), list[AnswerRow]()
    finished: list[AnswerRow] = []
    with torch.inference_mode(), routing.using(Route()):
        while True:
            waiting.extend(next_rows(finished, not waiting and not writing))
            while waiting and batch.has_room():
                writing.append(waiting.popleft())
                batch.add(writing[-1])
            if not writing:
                return
            batch.step()
            finished = [row for row in writing if row.finished]
            writing = [row for row in writing if not row.finished]


def write_rows(
    batch: Batch, rows: Sequence[AnswerRow], routing: Routing, work: Task | None = None
) -> None:
    """Writes all rows to their ends.

    Args:
        work: told how many rows are finished.
    """
    given = iter([rows])
    written, begun = 0, 0.0 if work is None else work.done

    def next_rows(finished: Sequence[AnswerRow], idle: bool) -> Sequence[AnswerRow]:
        nonlocal written
        written += len(finished)
        if work is not None:
            work.update(begun + written)
        return next(given, ())

    write_as_they_come(batch, routing, next_rows)


class Sampler:
    """Answers of a model under one route, the same for all rows.

    Args:
        model: a causal language model with its adapters; whoever calls `write` puts it into
            evaluation mode.
        tokenizer: says what ends an answer.

    Attributes:
        ending: what that is.
    """

    def __init__(self, model: LoraModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._base: Any = model.get_base_model()
        self.ending = ending(self._base, tokenizer)
        self.context_length = context_length_of(self._base)

    @cached_property
    def _carried(self) -> Carried:
        with self._model.routing.using(Route()):
            return how_carried(self._base)

    @cached_property
    def _memory(self) -> RowMemory:
        return RowMemory(self._base, self._model.routing, self._carried)

    @cached_property
    def _families(self) -> list[list[str]]:
        one = torch.zeros(1, 1, dtype=torch.long, device=self._base.device)
        with torch.inference_mode(), self._model.routing.using(Route()):
            return same_inputs(self._base, lambda: self._base(input_ids=one))

    @contextmanager
    def _packed(self, names: Sequence[str], steps: int) -> Iterator[None]:
        """The factors of the adapters that rows have are packed within the block.

        Where they are packed already, or that takes longer than it saves, nothing changes.

        Args:
            names: of each row's adapter; empty where no adapter or several are in force for all.
            steps: the most tokens that a row is given.
        """
        model = self._model
        adapters = [name for name in dict.fromkeys(names) if name != BASE]
        pays = bool(adapters) and steps >= PACKS_FROM and not self._carried.why_not
        if not pays or is_sharded(model) or model.packed is not None:
            yield
            return
        try:
            with torch.inference_mode(False):
                ranks = sum(model.peft_config[name].r for name in adapters)
                model.pack(self._families, alone=len({*names}) == 1, room=ranks)
                for name in adapters:
                    pack_adapter(model, name)
            yield
        finally:
            with torch.inference_mode(False):
                model.unpack()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        route: Route,
        work: Task | None = None,
        *,
        adapters: Sequence[str] = (),
        as_text: bool = False,
        pictures: Sequence[RowPictures | None] = (),
        most: int = MAX_ROWS,
    ) -> list[AnswerRow]:
        """The finished rows, in the order of the prompts.

        Args:
            sampling: of each prompt; the answer is cut to what the context has room for.
            route: of all rows.
            adapters: of each prompt, `BASE` for none, in the place of the route; empty for that.
            as_text: the rows' tickets get the text of the answers.
            pictures: those in each prompt; empty where there are none.
            most: so many are written at once, at most.

        Raises:
            LorakitError: the model failed.
        """
        if not prompts:
            return []
        names = adapters or [route.shared[0] if route.shared else BASE] * len(prompts)
        rows = [
            self.row(prompt, own, name, as_text=as_text, pictures=shown)
            for prompt, own, name, shown in zip(
                prompts, sampling, names, pictures or [None] * len(prompts), strict=True
            )
        ]
        longest = max(len(row.prompt) + row.ticket.sampling.max_new_tokens for row in rows)
        routing, most = self._model.routing, self._memory.rows(longest, min(most, len(rows)))
        of_all = None if adapters else route
        prefixes = prefixes_of([(row.adapter, row.prompt) for row in rows])
        kept: dict[str, Any] = {"prefixes": prefixes, "packed": lambda: self._model.packed}
        batch = self._carried.batch(self._base, routing, most, longest, of_all, **kept)
        steps = max(row.ticket.sampling.max_new_tokens for row in rows)
        with self._packed(adapters or (route.shared if len(route.shared) == 1 else ()), steps):
            write_rows(batch, rows, routing, work)
        for row in rows:
            if row.failed:
                raise LorakitError([*row.ticket][-1].error)
        return rows

    def row(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str,
        *,
        as_text: bool = False,
        pictures: RowPictures | None = None,
    ) -> AnswerRow:
        """A row to be written; other arguments as of `write`.

        Args:
            adapter: by whose name it is known, `BASE` for none.
        """
        room = min(sampling.max_new_tokens, self.context_length - len(prompt))
        shown = None if adapter == BASE else adapter
        settings = replace(sampling, max_new_tokens=max(1, room))
        ticket = Ticket(tuple(prompt), shown, settings, pictures)
        tokenizer = self._tokenizer if as_text or self.ending.text else None
        return AnswerRow(ticket, adapter, tokenizer, self.ending, self._base.device)

    def write_turns(self, next_rows: NextRows, route: Route, most: int, longest: int) -> None:
        """Writes rows that follow from each other, such as the turns of conversations.

        What a prompt has in common with an earlier row, its answer included, is not computed again.

        Args:
            next_rows: as in `write_as_they_come`; it looks itself for rows that have failed.
            route: of all rows.
            most: how many there are at once, at most.
            longest: the most tokens of a row, with its prompt.
        """
        routing, most = self._model.routing, min(FEW_ROWS, most)
        prefixes = PrefixCache(keeps_answers=True)
        batch = self._carried.batch(self._base, routing, most, longest, route, prefixes=prefixes)
        write_as_they_come(batch, routing, next_rows)


@contextmanager
def answering(model: LoraModel) -> Iterator[Route]:
    """Has a model in training answer as it is, without dropout; gives the route in force."""
    # Compiled for training, the blocks would be compiled again for every length; fused for it,
    # they would not be those that one function computes for a token of each row.
    with in_evaluation(model), torch.compiler.set_stance("force_eager"), not_fused(model):
        yield model.routing.route


def is_sharded(model: Any) -> bool:
    """Whether the weights are spread over machines, which must then compute in step."""
    return any(hasattr(weight, "device_mesh") for weight in model.parameters())


def sampled_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_new_tokens: int,
    seed: int,
    adapter: str | Path | None = None,
) -> list[str]:
    """An answer to the prompt of each sample, drawn at the temperature 1.

    Args:
        model: a causal language model without adapters; it is bare again afterwards.
        seed: of the first; each further one has a seed of its own, so that a prompt which stands
            there twice gets two answers.
        adapter: the folder of the adapter that answers; None is the model itself.

    Raises:
        InputError: a prompt does not fit the context, the chat template refuses it, or the adapter
            does not fit the model.
        LorakitError: the model failed.
    """
    limit = context_length_of(model) - 1
    prompts = []
    for sample in samples:
        try:
            prompts.append(prompt_tokens(sample.prompt, tokenizer, sample.tools, limit))
        except InputError as error:
            raise InputError(f"{sample.where}: {error}") from error
    drawn = [
        Sampling(temperature=1.0, max_new_tokens=max_new_tokens, seed=(seed + number) % 2**32)
        for number in range(len(samples))
    ]
    route = Route(shared=(TEACHER,) if adapter else ())
    if adapter:
        adapted = LoraModel.from_pretrained(model, adapter, TEACHER)
    else:
        adapted = LoraModel(model, None)
    try:
        with task("sampling answers", len(samples)) as work:
            sampler = Sampler(adapted.eval(), tokenizer)
            rows = sampler.write(prompts, drawn, route, work, as_text=True)
    finally:
        adapted.unload()
    texts = []
    for row in rows:
        with closing(iter(row.ticket)) as pieces:
            texts.append("".join(piece.text for piece in pieces).strip())
    return texts
