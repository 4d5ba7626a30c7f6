"""What goes wrong in reinforcement learning and can be seen in what is logged: causes and cures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.rewards.reward_table import RewardProblem

Found = tuple[str, str, str]
"""A warning's name, what was seen with its cause, and what to do."""

PATIENCE = 3
"""Logs in a row after which something is no accident."""
SHORTER, FLATTER, LONGER = 0.25, 0.1, 2.0
"""Of the first length and entropy: below these they have collapsed; above it, length has grown."""
CORRELATED = 0.9
GAP = 0.05
"""Nats a token between sampler and trainer; the most that bfloat16 explains is less."""


class GrpoWarnings:
    """Looks at the logs of one run.

    Args:
        settings: `GrpoSettings`.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._first: dict[str, float] = {}
        self._in_a_row: Counter[str] = Counter()
        self._problems: dict[str, RewardProblem] = {}

    def met(self, problems: Sequence[RewardProblem]) -> None:
        """Takes up why completions of a step have no reward; the first problem of each function."""
        for problem in problems:
            self._problems.setdefault(problem.name, problem)

    def of(self, logs: Mapping[str, float]) -> Iterator[Found]:
        """The warnings for what was logged at a step of training; none for held-out scores."""
        for name, problem in self._problems.items():
            yield (
                f"reward {name} fails" if name else "completions without a reward",
                problem.line,
                "Completions without any reward are not learned; the run goes on, and stops where "
                "a function gives no reward several times in a row. Try it with lorakit rewards.",
            )
        if "frac_reward_zero_std" not in logs:
            return
        for name in ("completions/mean_length", "entropy", "reward"):
            if name in logs:
                self._first.setdefault(name, logs[name])
        yield from self._groups(logs)
        yield from self._lengths(logs)
        yield from self._entropy(logs)
        yield from self._gap(logs)

    def _again(self, name: str, holds: bool) -> bool:
        """Whether something holds for so many logs in a row."""
        self._in_a_row[name] = self._in_a_row[name] + 1 if holds else 0
        return self._in_a_row[name] >= PATIENCE

    def _groups(self, logs: Mapping[str, float]) -> Iterator[Found]:
        share = logs["frac_reward_zero_std"]
        if "reward" not in logs:
            yield (
                "no rewards",
                "no completion got a reward: every function gave None or failed, so that nothing "
                "is learned",
                "Try the functions with lorakit rewards.",
            )
        elif self.settings.num_generations > 1 and self._again("groups", share >= 0.9):
            yield (
                "groups without signal",
                f"in {share:.0%} of the groups all completions have the same reward (the mean of "
                f"all is {logs['reward']:.3g}), so that they teach nothing: the prompts are too "
                "hard or too easy for this model, the reward never applies, or completions are all "
                "alike",
                "Look at completions and their rewards with lorakit rewards. Where nothing is "
                "right yet, train on some answers first or give part of the reward for parts of "
                "the answer; where all is right, take harder prompts or objective.dynamic_sampling="
                "true; raise objective.num_generations or objective.temperature.",
            )

    def _lengths(self, logs: Mapping[str, float]) -> Iterator[Found]:
        length, first = logs["completions/mean_length"], self._first["completions/mean_length"]
        cut = logs.get("completions/clipped_ratio", 0.0)
        if self._again("cut off", cut >= 0.5):
            yield (
                "completions are cut off",
                f"{cut:.0%} of the completions reach their limit of "
                f"{self.settings.max_completion_length} tokens and are judged without their end",
                "Raise objective.max_completion_length (and data.max_length); where the model "
                "never ends its answers, train on some answers first; or leave such completions "
                "out with objective.mask_truncated_completions=true.",
            )
        if self._again("short", length < SHORTER * first and length < first - 4):
            yield (
                "completions collapse",
                f"completions have become {first / max(length, 1):.0f} times shorter, from "
                f"{first:.0f} to {length:.0f} tokens: the rewards are won without an answer, or "
                "long ones are punished more than wrong ones",
                "Look at completions in the report. Give the reward for the answer itself, raise "
                "objective.beta, or lower training.learning_rate.",
            )
        correlation = logs.get("completions/reward_length_correlation", 0.0)
        if self._again("length", correlation > CORRELATED and length > LONGER * first):
            yield (
                "reward grows with length",
                f"completions have grown from {first:.0f} to {length:.0f} tokens, and the longer "
                f"one has the higher reward (correlation {correlation:.2f}): the reward may count "
                "length and not the answer",
                "Look at late completions in the report; add a reward against length (overlong), "
                "or use objective.loss_type=dr_grpo, which has no bias to length.",
            )

    def _entropy(self, logs: Mapping[str, float]) -> Iterator[Found]:
        first, now = self._first.get("entropy", 0.0), logs.get("entropy", 0.0)
        if self._again("entropy", first > 0.05 and now < FLATTER * first):
            yield (
                "entropy collapses",
                f"the entropy of sampled tokens has fallen from {first:.3f} to {now:.3f} nats: all "
                "completions of a prompt become alike, and nothing new is tried",
                "Raise objective.epsilon_high (0.28 in DAPO), objective.entropy_coef or "
                "objective.beta, lower training.learning_rate, or raise objective.temperature; if "
                "the reward is as high as you need it, stop here.",
            )

    def _gap(self, logs: Mapping[str, float]) -> Iterator[Found]:
        gap = logs.get("sampling/sampling_logp_difference/mean", 0.0)
        if gap > GAP:
            yield (
                "sampler and trainer differ",
                f"the log-probabilities of sampled tokens differ by {gap:.3f} nats on average "
                "between sampling and training: there is dropout or noise in training, or the "
                "dtype is too narrow for this model",
                "Set lora.lora_dropout and training.neftune_noise_alpha to 0, or give "
                "dtype=float32.",
            )
