"""Rollouts of several turns: the model in training answers an environment, or calls tools.

A source of rollouts (`sources.py`). The environments are in processes of their own
(`environment_process.py`), a rollout's course is `multi_turn.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.data.next_turn import drops_reasoning, next_turn
from lorakit.data.tool_calls import tool_calls_of
from lorakit.engine.rows_at_once import FEW_ROWS
from lorakit.engine.sampler import Sampler
from lorakit.errors import InputError, LorakitError
from lorakit.lora.routing import BASE
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.progress import task
from lorakit.rl.engine_rollouts import answering, sampling_of, written_of
from lorakit.rl.environment_process import EnvironmentProcess
from lorakit.rl.multi_turn import Conversation, Conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.engine.rows import AnswerRow
    from lorakit.lora.model import LoraModel
    from lorakit.lora.routing import Route
    from lorakit.objectives.objective import Objective
    from lorakit.progress import Task


class EnvironmentRollouts:
    """Writes rollouts with an environment; a `RolloutSource`. Its process ends with `close`.

    Raises:
        InputError: the environment cannot be used, there is no reward, or the chat template has no
            form for it.
        LorakitError: its process cannot be started.
    """

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        model: LoraModel | None = None,
    ) -> None:
        settings = objective.settings
        self._max_turns, self._tokenizer = settings.max_turns, tokenizer
        self._reader = tool_calls_of(tokenizer)
        self._sampler: Sampler | None = None
        spec, own = settings.environment_spec
        self._process = EnvironmentProcess(spec, settings.tools, own, settings.environment_timeout)
        try:
            if not (settings.rewards or self._process.steps or self._process.rewards):
                raise InputError(
                    "objective.environment gives no reward: give it a method get_reward, or give "
                    "objective.rewards"
                )
            self._check_template()
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> Mapping[str, str]:
        """As in `RolloutSource`: of the environment and the tools."""
        return self._process.files

    @property
    def notices(self) -> Sequence[str]:
        """As in `RolloutSource`."""
        if not drops_reasoning(self._tokenizer):
            return []
        return [
            "the chat template leaves out the reasoning of earlier turns: in rollouts it stays, "
            "since what was sampled is what is trained"
        ]

    def _check_template(self) -> None:
        tools = self._process.tools
        if tools and self._reader.form is None:
            raise InputError(
                "the model's chat template shows no tools, or writes no tool calls in a known "
                "form: take a model whose template does, or an environment with step alone"
            )
        answer = {"role": "user", "content": "a"}
        if tools and not self._process.steps:
            answer = {"role": "tool", "name": tools[0]["function"]["name"], "content": "a"}
        next_turn([answer], self._tokenizer, tools, strict=True)

    def write(
        self, asked: Sequence[AskedPrompt], model: LoraModel, step: int | None
    ) -> list[Rollout]:
        """As in `RolloutSource`.

        Raises:
            InputError: a row cannot be used.
            LorakitError: the model failed, or all environments did.
        """
        sampler = self._sampler = self._sampler or Sampler(model, self._tokenizer)
        talks = Conversations(
            self._process,
            self._tokenizer,
            self._reader,
            self._max_turns,
            sampler.context_length,
            sampler.ending,
        )
        try:
            with answering(model) as route, task("sampling conversations", len(asked)) as work:
                self._written(talks, talks.begin(asked), sampler, route, work)
        finally:
            talks.close()
        failed = [one for one in talks.all if one.failure]
        if failed and len(failed) == len(talks.all):
            raise LorakitError(
                f"the environment failed in all {len(failed)} conversations of a step, the first: "
                f"{failed[0].failure}"
            )
        return [one.rollout() for one in talks.all]

    def _written(
        self,
        talks: Conversations,
        begun: Sequence[Conversation],
        sampler: Sampler,
        route: Route,
        work: Task,
    ) -> None:
        """Writes conversations to their ends."""
        rows: dict[AnswerRow, Conversation] = {}
        waiting, most = deque(begun), min(FEW_ROWS, max(1, len(begun)))
        name = route.shared[0] if route.shared else BASE

        def row(one: Conversation) -> AnswerRow:
            room = one.room(sampler.context_length)
            sampling = replace(sampling_of(one.asked), max_new_tokens=room, seed=one.seed)
            return sampler.row([*one.prompt, *one.tokens], sampling, name)

        def next_rows(finished: Sequence[AnswerRow], idle: bool) -> list[AnswerRow]:
            for each in finished:
                talks.wrote(rows.pop(each), written_of(each))
            # Those that have begun go first, so that few have their past in memory.
            going = talks.ready(idle and not waiting)
            while waiting and len(rows) + len(going) < most:
                going.append(waiting.popleft())
            work.update(sum(one.closed for one in talks.all))
            made = {row(one): one for one in going}
            rows.update(made)
            return list(made)

        longest = max((len(one.prompt) + one.asked.max_new_tokens for one in begun), default=1)
        longest = min(longest, sampler.context_length)
        sampler.write_turns(next_rows, route, most, longest)

    def require(self) -> None:
        """As in `RolloutSource`: nothing is missing."""

    def close(self) -> None:
        """Ends the process."""
        self._process.close()
