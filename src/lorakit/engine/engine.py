"""Answers for many at once: one base model in memory, many adapters, one thread that computes.

Requests wait in a queue until there is room in the batch; then each is a row with its own adapter
and its own settings. The model and its adapters are `resident.py`'s, how rows are computed
`batch.py`'s and `plain_batch.py`'s, which adapters may be asked for `pool.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, Self

import torch

from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.adapter_reader import Loaded
from lorakit.engine.answering import Answering
from lorakit.engine.grammars import Grammars
from lorakit.engine.outputs import EMBEDDING, Outputs, of_base
from lorakit.engine.picture_features import FEATURE_BYTES, picture_features
from lorakit.engine.policy_losses import policy_loss, require_inputs
from lorakit.engine.pool import AdapterPool, Version
from lorakit.engine.prefix_cache import PREFIX_BYTES, PrefixCache
from lorakit.engine.prompt_scores import PromptScores, Scored, Scorer
from lorakit.engine.requests import Ticket, check_prompt, context_length_of
from lorakit.engine.resident import ResidentModel
from lorakit.engine.sampled import Sampled
from lorakit.engine.sampling import Sampling, ending
from lorakit.engine.speculation import Drafts, NgramSpeculation
from lorakit.engine.token_losses import AdapterRow, PassResult, TokenLoss, answer_row
from lorakit.engine.training_queue import TrainingQueue
from lorakit.errors import InputError, LorakitError, listed
from lorakit.lora.config import LoraConfig
from lorakit.lora.routing import BASE
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.classifier_form import ClassifierForm
from lorakit.models.fingerprint import fingerprint
from lorakit.models.load import load_model
from lorakit.models.loaded import take_into_memory, writes_text
from lorakit.models.sentence_pooling import LAST_TOKEN, MEAN, Pooling
from lorakit.openmp import release_worker_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.data.picture_rows import RowPictures

POOL_BYTES = 2 << 30

ToScore = tuple[Scored, Version | None, Loaded | None, Ticket | None]
"""A prompt, its adapter, and a request for one token behind it, which the same pass gives."""


class Engine:
    """One resident base model that answers with any of its adapters, and trains them.

    `with Engine("smollm2-135m-instruct") as engine: …` is a training loop's own engine; the server
    has the same one. Operations on one adapter are executed in the order in which they are called;
    rows of adapters that several threads train at once share passes.

    Args:
        model: a causal language model, which is the engine's from here on; or its name or folder.
            An encoder, or another body without a head, gives embeddings, scores and labels.
        tokenizer: of a model that is given itself.
        model_name: how users call it.
        dtype: in which a named model is loaded; None for the fastest.
        max_rows: how many answers are written at once; None is as many as the memory holds, and 16
            of any length at least, since memory is taken as rows come to fill it; `fit_rows` says
            how long they are.
        context_length: the most tokens of prompt and answer together; None is the model's own.
        pool_bytes: how much memory adapters may take that are not in use.
        feature_bytes: how much memory kept features of pictures may take.
        prefix_bytes: how much memory beginnings of prompts may take that are kept; 0 keeps none.
        pooling: how its embeddings are made; None is the last token of a causal model, of length 1,
            and the mean of an encoder's.
        form: the model's form for sequence classification, where adapters may be for that.
        speculation: has answers drafted from their prompts; None writes a token a step.

    Attributes:
        pool: the adapters that are registered.
        resident: the base, with those of them that answer now, and those that are trained.
        training: where operations on the latter are handed in.
        prefixes: beginnings of prompts that are kept, if any are.
        drafts: of answers, if there are any.
        notices: what a user should know about how this model is computed.
        writes, base_outputs: whether the model writes text, and what it gives without an adapter.
        vocabulary, width: its tokens, and the numbers of an embedding.
        grammars: the forms of answers that requests ask for.
        scorer: what scores prompts, on the thread that computes.

    Raises:
        InputError: a number is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_name: str = "",
        *,
        dtype: str | None = None,
        max_rows: int | None = 16,
        context_length: int | None = None,
        pool_bytes: int = POOL_BYTES,
        feature_bytes: int = FEATURE_BYTES,
        prefix_bytes: int = PREFIX_BYTES,
        pooling: Pooling | None = None,
        form: ClassifierForm | None = None,
        speculation: NgramSpeculation | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise InputError(f"max_rows must be at least 1, not {max_rows}")
        if isinstance(model, str | Path):
            model_name = model_name or str(model)
            model, own_tokenizer = load_model(str(model), dtype)
            tokenizer = tokenizer or own_tokenizer
        if tokenizer is None:
            raise InputError("a model that is not given by its name needs its tokenizer")
        model_name = model_name or str(model.config.name_or_path)
        self.model_name, self.tokenizer = model_name, tokenizer
        self.notices: list[str] = []
        self.writes = writes_text(model)
        self.base_outputs, head = of_base(model, form)
        self.pooling = pooling or (LAST_TOKEN if self.writes else MEAN)
        if self.pooling.notice and self.base_outputs == EMBEDDING:
            self.notices.append(f"{model_name}: {self.pooling.notice}")
        longest = None if self.writes else self.pooling.longest
        self.context_length = context_length_of(model, context_length, longest)
        take_into_memory(model)  # files may change while it is served
        self._model = model.eval()
        self._ending = ending(model, tokenizer)
        self.pool = AdapterPool(model, tokenizer, model_name, fingerprint(model), pool_bytes, form)
        pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        self.resident = ResidentModel(model, pad, stays_wrapped=True)
        self.resident.pack()
        self._bank = self.resident.model
        carried = self.resident.carried
        self.notices += carried.notices(model_name) if self.writes else []
        self.vocabulary = vocabulary_size(model)
        self.width = self.pooling.width(int(model.config.get_text_config().hidden_size))
        self.grammars = Grammars(self.tokenizer, self._ending, self.pool, self.vocabulary)
        self.prefixes = PrefixCache(prefix_bytes, keeps_answers=True) if prefix_bytes else None
        self.drafts = Drafts(speculation) if speculation else None
        self._changed = Condition()
        self._answers = Answering(
            self.resident,
            tokenizer,
            self._ending,
            max_rows=max_rows,
            room=self.longest_prompt + 1,
            pooling=self.pooling,
            head=head,
            features=picture_features(model, self._bank.routing, feature_bytes),
            prefixes=self.prefixes,
            drafts=self.drafts,
            changed=self._changed,
        )
        if speculation and getattr(self._answers.batch, "drafts", None) is None:
            self.notices.append(f"{model_name} reads no drafts, so speculative_config does nothing")
        self.training = TrainingQueue(self.resident, self._wake)
        self._reads_together = carried.padded and not carried.why_not
        self.scorer = Scorer(model, self._bank.routing)
        self._closing, self._deadline = False, 0.0
        release_worker_threads()
        self._thread = Thread(target=self._work, name="lorakit-engine", daemon=True)
        self._thread.start()

    # --- for those who ask ------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        sampling: Sampling | None = None,
        pictures: RowPictures | None = None,
        owner: str = "",
        types: Sequence[int] = (),
    ) -> Ticket:
        """Hands in a request, from any thread. An adapter that is not in memory is read here.

        Args:
            prompt: the tokens to be answered.
            adapter: a name in the pool; None is the base. A reward model's only piece is a score.
            sampling: None is greedy. `max_new_tokens` is cut to what the context has room for.
            pictures, types: those in the prompt; which text of a pair each token is of.
            owner: whose it is: where several wait, the one with the fewest tokens so far is next.

        Raises:
            InputError: there is no such adapter, the prompt is empty, too long, or has numbers
                that are no tokens, or the grammar cannot be compiled.
            LorakitError: the engine is closed.
        """
        sampling = sampling or Sampling()
        check_prompt(prompt, self._answers.room, self.vocabulary)
        room = self._answers.room - len(prompt)
        version, loaded = self.found(adapter)
        if not sampling.embeds and self.outputs(adapter).kind == "embedding":
            raise InputError(f"{adapter or self.model_name} gives embeddings and writes no text")
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        form = self.grammars.form(sampling.grammar, adapter)
        ticket = Ticket(tuple(prompt), adapter, sampling, pictures, types=tuple(types), form=form)
        with self._changed:
            if self._closing:
                raise LorakitError("the engine is closed and takes no more requests")
            tokens = len(prompt) + sampling.max_new_tokens
            self._answers.queue.push((ticket, version, loaded), owner, tokens)
            self._changed.notify()
        return ticket

    def fit_rows(self, longest: int) -> None:
        """Writes as many answers at once as the memory holds of so many tokens, prompts included.

        Requests that come later have no room for more. Nothing changes where the number was given.

        Raises:
            LorakitError: answers are being written.
        """
        if self._answers.fits:
            longest = min(longest, self.context_length)
            self.training.call(None, partial(self._answers.fit, longest)).result()

    @property
    def max_rows(self) -> int:
        """How many answers are written at once."""
        return self._answers.max_rows

    def score_prompt(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        top: int = 0,
        owner: str = "",
        answer: Ticket | None = None,
        ranked: bool = False,
    ) -> Future[PromptScores]:
        """The log-probabilities of a prompt's tokens, from any thread.

        Prompts that wait together are computed together, each by its own adapter.

        Args:
            top: so many of the likeliest tokens in the place of each.
            answer: a request for one token behind the prompt, which the same pass gives.
            ranked: the rank of each token is wanted too.

        Raises:
            InputError: as `submit`.
        """
        check_prompt(prompt, self.context_length, self.vocabulary)
        version, loaded = self.found(adapter)
        if not self.writes or self.outputs(adapter).kind == "embedding":
            raise InputError(f"{adapter or self.model_name} gives no probabilities of tokens")
        key = BASE if version is None else version.key
        scored = Scored(key, prompt, top, goes_on=answer is not None, ranked=ranked)
        return self.training.together(
            self.score_together,
            (scored, version, loaded, answer),
            owner=owner or "prompts",
            tokens=len(prompt),
            most=self.max_rows if self._reads_together else 1,
        )

    def score_together(self, asked: Sequence[ToScore]) -> list[PromptScores]:
        """The scores of prompts out of one pass; for the thread that computes."""
        needed = {version.key for _, version, *_ in asked if version is not None}
        for _, version, loaded, _ in asked:
            self._answers.bring(version, loaded, needed)
        self.resident.answering()
        found = self.scorer.score([scored for scored, *_ in asked])
        for scores, (_, version, _, answer) in zip(found, asked, strict=True):
            if answer is not None and scores.next_logits is not None:
                self._answers.row(answer, version).answer_at_once(scores.next_logits)
        return found

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt: where text is written, one of an answer must fit too."""
        return self.context_length - self.writes

    def outputs(self, adapter: str | None) -> Outputs:
        """What the adapter gives, or the base (None); InputError if there is no such adapter."""
        return self.base_outputs if adapter is None else self.pool.version(adapter).info.outputs

    def tokenizer_of(self, adapter: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer with the adapter's chat template; InputError if there is no such one."""
        return self.tokenizer if adapter is None else self.pool.version(adapter).tokenizer

    def waiting(self) -> int:
        """How many requests wait for room, or for their pictures to be decoded."""
        return self._answers.waiting()

    def running(self) -> int:
        """How many answers are being written."""
        return len(self._answers.batch.rows)

    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    def close(self, drain: float = 0.0, wait: float | None = None) -> bool:
        """Takes no more requests, and ends the running ones after at most `drain` seconds.

        Args:
            wait: for how many seconds more to wait for the thread that computes; None is for ever.

        Returns: whether that thread has ended.
        """
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + drain
            self._changed.notify()
        self._thread.join(None if wait is None else drain + wait)
        return not self._thread.is_alive()

    def found(self, adapter: str | None) -> tuple[Version | None, Loaded | None]:
        """An adapter of the pool and its values; neither for the base.

        Raises:
            InputError: there is no such adapter.
        """
        if adapter is None:
            return None, None
        version = self.pool.version(adapter)
        return version, self.pool.loaded(version)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # --- for training loops -----------------------------------------------------------------

    def create_adapter(
        self, name: str, config: LoraConfig | None = None, *, seed: int = 0, **options: Any
    ) -> None:
        """Adds a new adapter, which changes nothing yet.

        Args:
            config: by default one of all linear layers, with the `options`.
            seed: of its first values and its dropout.
            options: fields of `LoraConfig`, such as `r` and `lora_alpha`.

        Raises:
            InputError: the name is taken, or the configuration does not fit the model.
        """
        if config is None:
            config = LoraConfig(**{"target_modules": "all-linear", **options})
        elif options:
            raise InputError(f"give a config, or {listed([*options])}, not both")
        self.training.call(name, lambda: self.resident.create(name, config, seed)).result()

    def load(self, name: str, folder: str | Path, *, optimizer: bool = True) -> None:
        """Adds the adapter in `folder`, with the optimizer's state if `save` has left one there.

        Raises:
            InputError: as `ResidentModel.load`.
        """
        work = partial(self.resident.load, name, folder, optimizer=optimizer)
        self.training.call(name, work).result()

    def save(self, name: str, folder: str | Path, *, optimizer: bool = True) -> None:
        """Writes an adapter in PEFT's form, and its optimizer's state if it has made a step."""
        work = partial(self.resident.copied, name, optimizer=optimizer)
        self.training.call(name, work).result().save(folder)

    row = staticmethod(answer_row)

    def forward_backward(
        self,
        rows: Sequence[AdapterRow],
        loss: str | TokenLoss = "cross_entropy",
        **settings: float,
    ) -> PassResult:
        """Adds the gradients of the rows' losses, summed, to those of their adapters.

        Args:
            rows: of one adapter or several.
            loss: a name of `POLICY_LOSSES`, or a function of a row's log-probabilities.
            settings: of a loss that is given by its name.

        Raises:
            InputError: there is no such adapter, loss or setting, or a row does not fit the loss.
        """
        return self._over_rows(rows, loss, settings, learning=True)

    def forward(
        self,
        rows: Sequence[AdapterRow],
        loss: str | TokenLoss = "cross_entropy",
        **settings: float,
    ) -> PassResult:
        """As `forward_backward`, without dropout and gradients."""
        return self._over_rows(rows, loss, settings, learning=False)

    def optim_step(
        self, name: str, learning_rate: float = 1e-4, **settings: Any
    ) -> dict[str, float]:
        """Applies the gradients of an adapter, and clears them.

        Args:
            settings: further fields of `AdamW`, such as `max_grad_norm`.

        Returns: `grad_norm`, before clipping.

        Raises:
            InputError: there is no such adapter, or its gradients are missing, NaN or Inf.
        """
        step = AdamW(learning_rate, **settings)
        return self.training.call(name, lambda: self.resident.optim_step(name, step)).result()

    def sample(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, **settings: Any
    ) -> list[Sampled]:
        """Answers to prompts by an adapter as it is now.

        Args:
            prompts: the tokens of each.
            adapter: one that is trained here; None is the base.
            settings: fields of `Sampling`, such as `temperature`, `max_new_tokens` and `seed`; by
                default each token is the likeliest. Prompt number i draws from `seed + i`.

        Returns: in the order of the prompts.

        Raises:
            InputError: there is no such adapter, or a prompt is empty or too long.
        """
        sampling = Sampling(**settings)
        ends = self._ending.tokens if sampling.end_tokens is None else sampling.end_tokens
        name = adapter or BASE
        work = partial(
            self.resident.sample,
            prompts,
            [name] * len(prompts),
            replace(sampling, end_tokens=None),
            ends=ends,
            max_rows=self.max_rows,
        )
        return self.training.call(name, work).result()

    def _over_rows(
        self,
        rows: Sequence[AdapterRow],
        loss: str | TokenLoss,
        settings: Mapping[str, float],
        *,
        learning: bool,
    ) -> PassResult:
        if isinstance(loss, str):
            name, loss = loss, policy_loss(loss, settings)
            for row in rows:
                require_inputs(name, row, settings)
        elif settings:
            raise InputError("settings are for losses that are given by their names")
        return self.training.over_rows(rows, loss, learning=learning)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the thread that computes -----------------------------------------------------------

    def _work(self) -> None:
        try:
            self._answer()
        finally:  # whatever happened: nobody waits for a thread that has ended
            self._end_all()

    @torch.inference_mode()
    def _answer(self) -> None:
        turn_ends = 0.0
        while True:
            with self._changed:
                while self._answers.idle() and not (self.training.waiting() or self._closing):
                    self._changed.wait()
                done = not self._answers.under_way()
                if self._closing and (done or time.monotonic() > self._deadline):
                    return
            if self.training.waiting() and (time.monotonic() > turn_ends or self._answers.idle()):
                began = time.monotonic()
                with torch.inference_mode(False):
                    self.training.tick()
                self.resident.answering()
                # A pass is as long as many steps: answers are written as long as it took.
                turn_ends = 2 * time.monotonic() - began
            self._answers.advance()

    def _end_all(self) -> None:
        with self._changed:
            self._closing = True
        self.training.close()
        self.grammars.close()
        self._answers.close()
