"""An engine's base or one of its adapters, as lm-evaluation-harness asks a model.

Requests are tokenised, truncated and cut as by its own Hugging Face backend (`lm_eval.models.
huggingface.HFLM`), so that results are the same but for rounding; they are computed by the engine.
What the first of several models is asked, the others are asked in the same batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorakit.data.templates import render
from lorakit.engine.engine import Engine
from lorakit.engine.prompt_scores import Scored
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling, end_tokens
from lorakit.engine.score_all import score_all
from lorakit.errors import InputError, LorakitError
from lorakit.lora.routing import BASE
from lorakit.progress import task

Asked = TypeVar("Asked")
Found = TypeVar("Found")

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
_READ = {*_SAMPLING, "until", "max_gen_toks", "do_sample", "temperature"}


class EngineLM(TemplateLM):
    """One of the models of an engine.

    Args:
        engine: answers.
        model: an adapter's name; None is the base.
        chat: requests are written with the chat template, so that what it closes a turn with ends
            an answer.
        peers: models that will be asked for the same; this one is among them.
        seed: of sampled answers; each has a seed of its own.
        notices: counts what a user should know, by what to say.
    """

    def __init__(
        self,
        engine: Engine,
        model: str | None,
        *,
        chat: bool = False,
        peers: list[EngineLM] | None = None,
        seed: int = 1234,
        notices: Counter[str] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = engine.tokenizer_of(model)
        self.notices = Counter[str]() if notices is None else notices
        self._engine, self._model, self._chat, self._seed = engine, model, chat, seed
        self._peers = [self] if peers is None else peers
        self._known: dict[str, tuple[list[Any], list[Any]]] = {}
        # With the template, what closes a turn ends an answer; else what ends it for transformers.
        told = self.tokenizer if chat else None
        self._ends = end_tokens(engine.resident.base, told)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the BOS token, or the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self._engine.context_length

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer, where a task says nothing."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text; a BOS token that it begins with is not written twice."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begins = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and has_bos_prefix(string, begins):
            options["add_special_tokens"] = False
        return [*self.tokenizer.encode(string, **options)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where an answer begins, or with the beginning of one.

        A system message is left out where the template refuses it, with a notice.

        Raises:
            InputError: the template refuses the conversation.
        """
        if not add_generation_prompt:
            return self._begun(chat_history)
        try:
            return render(chat_history, self.tokenizer, add_generation_prompt=True)
        except InputError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = render(rest, self.tokenizer, add_generation_prompt=True)
        self.notices["the chat template takes no system message, so that it is left out"] += 1
        return text

    def _begun(self, chat_history: list[dict[str, str]]) -> str:
        """A conversation whose last message is the beginning of an answer."""
        *before, last = chat_history
        return self.apply_chat_template(before) + last["content"]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, kind: str = "loglikelihood"
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the likeliest one.

        Args:
            requests: (texts, tokens of the context, tokens of the continuation) each.
        """
        asked: list[tuple[list[int], int]] = []
        for texts, context, continuation in requests:
            if not continuation:
                raise InputError(
                    f"the continuation {texts[1]!r} of {texts[0][-80:]!r} has no token of its own, "
                    "so that it cannot be scored: change the task's choices or its target_delimiter"
                )
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation):,} tokens, and the model reads "
                    f"{self.max_length:,}: shorten it"
                )
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            if len(tokens) < len(context) + len(continuation):
                self.notices["a context is longer than the model reads: its beginning is cut"] += 1
            asked.append((tokens, len(tokens) - len(continuation)))
        return self._with_peers(kind, asked, self._scored)

    def _scored(
        self, asked: Sequence[tuple[str | None, tuple[list[int], int]]]
    ) -> list[tuple[float, bool]]:
        prompts = [
            Scored(model or BASE, tokens, top=1, begin=begin) for model, (tokens, begin) in asked
        ]
        found: list[tuple[float, bool]] = []
        for (model, _), prompt, scores in zip(
            asked, prompts, score_all(self._engine, prompts), strict=True
        ):
            total = sum(scores.logprobs)
            if total != total:
                raise LorakitError(f"the logits of {model or 'the base model'} are NaN or Inf")
            likeliest = [row[0][0] for row in scores.rivals]
            found.append((total, likeliest == [*prompt.tokens[prompt.begin :]]))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for (text,) in (request.args for request in requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in own]
            counts.append(len(windows) - before)
        scored = iter(self._loglikelihood_tokens(windows, kind="rolling"))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a text that ends it."""
        asked = [
            self._request(request.args[0], request.args[1], number)
            for number, request in enumerate(requests)
        ]
        return self._with_peers("generate", asked, self._written)

    def _request(
        self, context: str, given: dict[str, Any], number: int
    ) -> tuple[list[int], Sampling]:
        kwargs = normalize_gen_kwargs(given, self.max_gen_toks)
        until = handle_stop_sequences(kwargs["until"], eos=self.tokenizer.decode(self.eot_token_id))
        most = kwargs["max_gen_toks"]
        if most >= self.max_length:
            raise InputError(
                f"a task asks for answers of {most:,} tokens, and the model reads "
                f"{self.max_length:,}: set max_gen_toks in its generation_kwargs"
            )
        for name in kwargs.keys() - _READ:
            if (name, kwargs[name]) != ("num_beams", 1):
                self.notices[f"generation_kwargs: {name} is not read"] += 1
        tokens = self.tok_encode(context)
        room = self.max_length - most
        if len(tokens) > room:
            self.notices["a prompt is longer than the model reads: its beginning is cut"] += 1
        ids = ((text, self.tokenizer.convert_tokens_to_ids(text)) for text in until)
        marks = {text: one for text, one in ids if one in self.tokenizer.all_special_ids}
        drawn = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        sampling = Sampling(
            temperature=kwargs["temperature"] if kwargs["do_sample"] else 0.0,
            max_new_tokens=most,
            seed=(self._seed + number) % 2**32,
            stop=tuple(text for text in until if text and text not in marks),
            end_tokens=frozenset([*self._ends, *marks.values()]),
            **drawn,
        )
        return tokens[-room:], sampling

    def _written(self, asked: Sequence[tuple[str | None, tuple[list[int], Sampling]]]) -> list[str]:
        longest = max(len(tokens) + sampling.max_new_tokens for _, (tokens, sampling) in asked)
        self._engine.fit_rows(longest)
        # Prompts that begin alike come one behind the other, as long as that is kept.
        order = sorted(range(len(asked)), key=lambda i: (asked[i][0] or "", asked[i][1][0]))
        tickets: dict[int, Ticket] = {}
        for i in order:
            model, (tokens, sampling) = asked[i]
            tickets[i] = self._engine.submit(tokens, model, sampling)
        texts = [""] * len(asked)
        with task("answering", len(asked)) as work:
            for i in order:
                last = [*tickets[i]][-1]
                if last.error:
                    raise LorakitError(last.error)
                texts[i] = self._text(tickets[i])
                work.advance()
        return texts

    def _text(self, ticket: Ticket) -> str:
        own = ticket.tokens
        if own[-1] in (ticket.sampling.end_tokens or ()):
            own = own[:-1]
        text = str(self.tokenizer.decode(own, skip_special_tokens=True))
        return str(postprocess_generated_text(text, [*ticket.sampling.stop], None))

    def _with_peers(
        self,
        kind: str,
        asked: list[Asked],
        compute: Callable[[Sequence[tuple[str | None, Asked]]], list[Found]],
    ) -> list[Found]:
        """What this model says; its peers that come later say it at the same time.

        They are asked again where they are asked for something else, as by another template.
        """
        known = self._known.pop(kind, None)
        if known is not None and known[0] == asked:
            return known[1]
        if not asked:
            return []
        later = self._peers[self._peers.index(self) :]
        models = [one for one in later if one._reads_as(self)]
        found = compute([(one._model, request) for one in models for request in asked])
        for number, one in enumerate(models):
            one._known[kind] = asked, found[number * len(asked) : (number + 1) * len(asked)]
        return self._known.pop(kind)[1]

    def _reads_as(self, other: EngineLM) -> bool:
        """Whether it is asked for the same tokens, as far as that is known."""
        mine, theirs = self.tokenizer, other.tokenizer
        same = not self._chat or mine.chat_template == theirs.chat_template
        return self is other or (same and len(mine) == len(theirs) and self._ends == other._ends)
