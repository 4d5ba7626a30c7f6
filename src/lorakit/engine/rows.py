"""One answer while it is written: what it has, what comes next, and when it ends.

Whatever a request brings (a tokenizer, sampling settings, stop texts) is used here and may fail.
Nothing of that leaves a row: a row that fails ends with the reason `error`, and it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lorakit.data.masking import TokenizedRow
from lorakit.engine.choosing import Chooser
from lorakit.engine.requests import AnswerPiece, ChosenToken, FinishReason, Ticket, TokenLogprob
from lorakit.engine.restricting import restrict
from lorakit.engine.sampling import Ending
from lorakit.engine.text import AnswerText
from lorakit.errors import InputError, LorakitError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerRow:
    """A request in a batch.

    Args:
        tokenizer: None leaves the answer as tokens, without any text.

    Attributes:
        adapter: its adapter's name in the bank, or `"__base__"`.
        past: whose past its prompt may begin with: that of rows with the same text here.
        pictures: those that stand in its prompt.
        read: how many tokens of the prompt the model has seen.
        branch: at how many of them reading stops once, as other prompts begin with these; else 0.
        moved: by how much positions behind its pictures are moved (`PicturePositions`).
        chooser: chooses them.
        tokens: the answer's tokens.
        finished: whether the last piece has been handed over.
        failed: whether it ended with an error.
    """

    def __init__(
        self,
        ticket: Ticket,
        adapter: str,
        tokenizer: PreTrainedTokenizerBase | None,
        ending: Ending,
        device: torch.device,
    ) -> None:
        self.ticket, self.adapter = ticket, adapter
        salt = ticket.sampling.cache_salt
        self.past = f"{adapter} {salt}" if salt else adapter
        self.prompt, self.pictures = ticket.prompt, ticket.pictures
        self.read = self.moved = self.branch = 0
        self.tokens = ticket.tokens
        self.finished = self.failed = False
        sampling, self._tokenizer = ticket.sampling, tokenizer
        given = sampling.end_tokens
        ends = frozenset() if sampling.ignore_eos else ending.tokens if given is None else given
        self._ends = ends | sampling.stop_token_ids
        end_text = "" if sampling.ignore_eos or given is not None else ending.text
        self.chooser = Chooser(sampling, self.prompt, device)
        stop = (*sampling.stop, *([end_text] if end_text else []))
        before = ending.before if ending.before and self._is_asked(ending.prompt) else ""
        included = sampling.stop if sampling.include_stop_str_in_output else ()
        self._text = AnswerText(tokenizer, stop, before, sampling.special_tokens, included)
        self._logprobs: list[ChosenToken] = []

    def _is_asked(self, how: str) -> bool:
        """Whether the prompt ends as the chat template asks for an answer."""
        tail = self.prompt[-len(how.encode()) - 1 :]
        return bool(how) and self._read(*tail).endswith(how)

    def asked(self) -> TokenizedRow:
        """Its prompt as a row, with its pictures."""
        return TokenizedRow([*self.prompt], [], "the prompt", pictures=self.pictures)

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the likeliest one, and nothing else is asked for."""
        asked = self.ticket.sampling.logprobs is not None or self.is_restricted
        return self.chooser.is_plain and not asked

    @property
    def is_simple(self) -> bool:
        """Whether its next token can be chosen with others' (`choosing.choose_together`)."""
        sampling = self.ticket.sampling
        coldest = sampling.scaled_logprobs and self.chooser.temperature != sampling.temperature
        # Log-probabilities are of logits as they are before anything is taken out of them.
        alone = sampling.logprobs is not None if self.is_restricted else bool(sampling.logprobs)
        return self.chooser.is_simple and not alone and not coldest

    @property
    def is_restricted(self) -> bool:
        """Whether the logits of its next token are changed before the choice (`restricting`)."""
        sampling = self.ticket.sampling
        changed = sampling.logit_bias or sampling.allowed_token_ids or self._goes_on
        return bool(changed) or self.ticket.form is not None

    @property
    def _goes_on(self) -> bool:
        """Whether it may not end yet."""
        return self.new_tokens < self.ticket.sampling.min_tokens

    @property
    def early_ends(self) -> frozenset[int]:
        """Tokens that would end it, as long as it may not end yet."""
        return self._ends if self._goes_on else frozenset()

    @property
    def last(self) -> int:
        """The newest token of the answer, which the model has not seen yet."""
        return self.tokens[-1]

    @property
    def seen(self) -> Sequence[int]:
        """The tokens that the model has seen."""
        if self.tokens:
            return self.prompt + tuple(self.tokens[:-1])
        return self.prompt[: self.read]

    @property
    def new_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """How many of its tokens the model has seen."""
        return self.read + max(0, self.new_tokens - 1)

    def advance(
        self, logits: torch.Tensor, chosen: int | None = None, logprob: float | None = None
    ) -> int:
        """Chooses the next token by `logits` (vocabulary,), takes it in, and returns it.

        A row that fails at this is finished, with the reason `error`.

        Args:
            chosen: the token, where it is known already.
            logprob: its log-probability, of a row that is simple.
        """
        try:
            if chosen is None:
                chosen = self._chosen(precise(logits))
            elif logprob is not None and self.ticket.sampling.logprobs is not None:
                self._logprobs.append(ChosenToken(chosen, self._read(chosen), logprob))
            self._took(chosen)
        except InputError as error:  # such as a grammar that cannot be continued
            self.refuse(error)
        except BaseException as error:  # panics of Rust's tokenizers are no Exception
            self.fail(f"the answer could not be written: {reason(error)}")
        return self.last if self.tokens else 0

    def answer_at_once(self, logits: torch.Tensor) -> None:
        """Answers a request for one token by the logits (vocabulary,) behind the whole prompt."""
        self.read = len(self.prompt)
        if logits.max().isfinite():  # NaN wherever there is one
            self.advance(logits)
        else:
            self.fail_by_logits()

    def finish(self, why: FinishReason, text: str = "") -> None:
        """Ends the answer, with the text that was held back."""
        if self.finished:
            return
        try:
            text += self._text.finish()
        except BaseException as error:
            self.fail(f"the answer could not be written: {reason(error)}")
        else:
            self._end(why, text)

    def fail(self, error: str) -> None:
        """Ends the answer with an error; nothing that its request brought is used for that."""
        if not self.finished:
            self._end("error", error=error)

    def refuse(self, error: InputError) -> None:
        """Ends the answer with an error of what its request asks for."""
        self._end("error", error=str(error), refused=True)

    def fail_by_logits(self) -> None:
        """Ends an answer whose logits are NaN or Inf."""
        who = "the base model" if self.ticket.adapter is None else f"'{self.ticket.adapter}'"
        self.fail(f"the logits of {who} are NaN or Inf here, so there is no next token")

    def _chosen(self, logits: torch.Tensor) -> int:
        asked = self.ticket.sampling.logprobs
        # Kept before the choice, which may change the logits.
        logs = None if asked is None else self._scaled(logits).log_softmax(-1)
        if self.is_restricted:
            logits = logits.clone()  # they may be the model's own
            refused = restrict_rows(logits[None], [self])
            if refused:
                raise refused[0]
        token = self.chooser.choose(logits)
        if logs is not None:
            self._logprobs.append(self._logprob(logs, token, asked or 0))
        return token

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self.ticket.sampling
        scales = sampling.scaled_logprobs and sampling.temperature > 0
        return logits / sampling.temperature if scales else logits

    def _took(self, token: int) -> None:
        self.tokens.append(token)
        self.chooser.took(token)
        complete = self.ticket.form is not None and self.ticket.form.took(token)
        stops = self.new_tokens > self.ticket.sampling.min_tokens
        if token in self._ends:
            shown = self.ticket.sampling.include_stop_str_in_output
            self.finish("stop", self._text.add(token, stops=False) if shown else "")
            return
        text = self._text.add(token, stops=stops)
        if self._text.stopped or complete:
            self.finish("stop", text)
        elif self.new_tokens >= self.ticket.sampling.max_new_tokens:
            self.finish("length", text)
        elif text or self._logprobs:
            self._hand_over(text)

    def _end(
        self, why: FinishReason, text: str = "", error: str = "", refused: bool = False
    ) -> None:
        self.finished, self.failed = True, why == "error"
        self._hand_over(text, why, error, refused)

    def _hand_over(
        self, text: str, why: FinishReason | None = None, error: str = "", refused: bool = False
    ) -> None:
        logprobs, self._logprobs = tuple(self._logprobs), []
        self.ticket.put(AnswerPiece(text, logprobs, self.new_tokens, why, error, refused))

    def _logprob(self, logs: torch.Tensor, token: int, rivals: int) -> ChosenToken:
        top = logs.topk(min(rivals, len(logs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return ChosenToken(
            token,
            self._read(token),
            logs[token].item(),
            tuple(TokenLogprob(other, self._read(other), value) for other, value in pairs),
        )

    def _read(self, *tokens: int) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode(list(tokens)))


def restrict_rows(logits: torch.Tensor, rows: Sequence[AnswerRow]) -> dict[int, InputError]:
    """Takes out of logits (rows, vocabulary), in place, what may not come next in each row.

    Returns: why nothing can come next, by the numbers of rows of which that is so.
    """
    sampling = [row.ticket.sampling for row in rows]
    forms = [row.ticket.form for row in rows]
    return restrict(logits, sampling, [row.early_ends for row in rows], forms)


def precise(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def reason(error: BaseException) -> str:
    """What an error says in one line, with its kind where that adds something."""
    said, kind = first_line(error), type(error).__name__
    plain = isinstance(error, (LorakitError, RuntimeError)) or said == kind
    return said if plain else f"{kind}: {said}"
