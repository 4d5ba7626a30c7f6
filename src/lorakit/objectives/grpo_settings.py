"""The settings of `objective: grpo`: TRL's names and defaults (`GRPOConfig`), and their limits."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_validator
from pydantic.functional_serializers import WrapSerializer

from lorakit.errors import did_you_mean
from lorakit.objectives.advantages import ESTIMATORS, Scale
from lorakit.objectives.policy_gradient import LOSSES, Level
from lorakit.objectives.settings import Settings

FROM_PYTHON = "python:"
"""What the record has of a reward that is a function given from Python, with its name."""


def _recorded(reward: Any, handler: SerializerFunctionWrapHandler) -> Any:
    if callable(reward):
        return FROM_PYTHON + getattr(reward, "__name__", type(reward).__name__)
    return handler(reward)


Reward = Annotated[Any, WrapSerializer(_recorded)]


class GrpoSettings(Settings):
    """TRL's settings of GRPO, and those that it has no name for.

    A batch of `per_device_train_batch_size` rows is so many prompts, and each of them gets
    `num_generations` completions; TRL counts completions there.

    Attributes:
        rewards: what completions are judged by (`rewards.reward_specs`): functions of a file
            (`rewards.py:name`) or module, built-in ones, or functions given from Python.
        weights: of each reward in the total; None is 1 for all (TRL's `reward_weights`).
        reward_timeout: seconds that a reward may take for the completions of a step.
        num_generations: completions of each prompt.
        max_completion_length: tokens of a completion.
        temperature, top_p, top_k, min_p, repetition_penalty: of sampling. Log-probabilities are
            those of logits / temperature, here as in the loss.
        loss_type: one of `policy_gradient.LOSSES`.
        advantage_estimator: one of `advantages.ESTIMATORS`.
        scale_rewards: what advantages are divided by: the standard deviation of the group or of
            all; None is as the estimator is defined.
        multi_objective_aggregation: as in `advantages.advantages`.
        epsilon, epsilon_high, delta: where ratios are clipped; `epsilon_high` is `epsilon` where
            it is not given.
        importance_sampling_level: ratios of tokens, or of whole completions.
        mask_truncated_completions: completions that the limit of tokens has cut off are not
            learned.
        beta: how strongly the adapter is kept near its reference by the KL divergence: the base,
            or the adapter that the run starts from.
        use_bias_correction_kl: the KL is multiplied by the importance ratio.
        off_policy_mask_threshold: completions with a negative advantage from which the policy has
            moved away by more nats a token are not learned.
        top_entropy_quantile: the share of a step's tokens, those with the highest entropies, whose
            policy loss counts (Wang et al. 2025, arXiv:2506.01939).
        entropy_coef: the mean entropy of these tokens, times this, is taken off the loss.
        steps_per_generation: batches of a process whose prompts are sampled together; None for
            those of an optimizer step.
        num_iterations: how often completions are learned.
        dynamic_sampling: groups whose rewards are all equal are replaced by those of further
            prompts (DAPO, arXiv:2503.14476), at most `max_resamples` times a step.
        temperature_eval: of the completion that each held-out prompt gets; 0 is the likeliest.
        sapo_temperature_pos, sapo_temperature_neg: of `loss_type: sapo`.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of `loss_type: vespo`.
        environment: what answers the model turn by turn: a class of a file (`env.py:Name`) or
            module, or given from Python; a mapping with `type` has its arguments too.
        tools: functions that the model may call, each as `tools.py:name` or `module:name`.
        max_turns: the most turns of the model in a conversation.
        environment_timeout: seconds that one call of the environment or of a tool may take.
        rollouts: what samples: the resident model, or vLLM with each step's adapter.
        vllm_server_base_url: of a server of vLLM; None starts one.
        vllm_server_timeout: seconds that it may take to start, and for a completion.
        vllm_max_model_length, vllm_gpu_memory_utilization, vllm_tensor_parallel_size: of the one
            that is started; None is vLLM's default.
        vllm_importance_sampling_clip_max: the most that exp(own - vLLM's log-probability), by
            which the loss of each token is multiplied, may be.
        seed: of sampling.
    """

    rewards: list[Reward] = Field(default_factory=list)
    weights: list[float] | None = None
    reward_timeout: Annotated[float, Field(gt=0)] = 60.0
    num_generations: Annotated[int, Field(ge=1, le=2**16)] = 8
    max_completion_length: Annotated[int, Field(ge=1, le=2**20)] = 512
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    loss_type: str = "dapo"
    advantage_estimator: str = "grpo"
    scale_rewards: Scale | None = None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    epsilon: Annotated[float, Field(ge=0)] = 0.2
    epsilon_high: Annotated[float, Field(ge=0)] | None = None
    delta: Annotated[float, Field(gt=0)] | None = None
    importance_sampling_level: Level = "token"
    mask_truncated_completions: bool = False
    beta: Annotated[float, Field(ge=0)] = 0.0
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: Annotated[float, Field(gt=0)] | None = None
    top_entropy_quantile: Annotated[float, Field(ge=0, le=1)] = 1.0
    entropy_coef: float = 0.0
    steps_per_generation: Annotated[int, Field(ge=1)] | None = None
    num_iterations: Annotated[int, Field(ge=1, le=1000)] = 1
    dynamic_sampling: bool = False
    max_resamples: Annotated[int, Field(ge=1, le=100)] = 3
    temperature_eval: Annotated[float, Field(ge=0, le=100)] = 0.0
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    environment: str | dict[str, Any] | None = None
    tools: list[str] = Field(default_factory=list)
    max_turns: Annotated[int, Field(ge=1, le=10_000)] = 10
    environment_timeout: Annotated[float, Field(gt=0)] = 30.0
    rollouts: Literal["engine", "vllm"] = "engine"
    vllm_server_base_url: str | None = None
    vllm_server_timeout: Annotated[float, Field(gt=0)] = 600.0
    vllm_max_model_length: Annotated[int, Field(ge=2)] | None = None
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    vllm_tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    vllm_importance_sampling_clip_max: Annotated[float, Field(gt=0)] = 3.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @property
    def clip_max(self) -> float | None:
        """What the truncated importance ratios to the sampler are clipped at, if there are some."""
        return self.vllm_importance_sampling_clip_max if self.rollouts == "vllm" else None

    @property
    def learns_by_entropy(self) -> bool:
        """Whether the loss has to do with the entropies of all tokens of a step."""
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    @property
    def converses(self) -> bool:
        """Whether a completion may have several turns."""
        return self.environment is not None or bool(self.tools)

    @property
    def environment_spec(self) -> tuple[str | None, dict[str, Any]]:
        """The class of the environment, as `FILE.py:CLASS`, and its arguments."""
        if not isinstance(self.environment, dict):
            return self.environment, {}
        own = dict(self.environment)
        return own.pop("type"), own

    @property
    def environment_name(self) -> str | None:
        """What the environment's reward is called: its class."""
        spec, _ = self.environment_spec
        return None if spec is None else spec.rpartition(":")[2]

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def level(self) -> Level:
        """Of importance ratios."""
        return LOSSES[self.loss_type].level or self.importance_sampling_level

    @field_validator("rewards", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        one = isinstance(value, (str, dict)) or callable(value)
        return [value] if one else value

    @field_validator("environment", mode="before")
    @classmethod
    def _named_environment(cls, value: Any) -> Any:
        if inspect.isclass(value):
            file = inspect.getsourcefile(value)
            if file is None or not value.__qualname__.isidentifier():
                raise ValueError("should be a class at the top of a file, which processes import")
            return f"{file}:{value.__name__}"
        if isinstance(value, dict) and not isinstance(value.get("type"), str):
            raise ValueError(
                "should have a type: {type: env.py:Name}, with arguments beside it (for rows of "
                "several kinds one class, whose reset chooses by a column)"
            )
        return value

    @field_validator("min_p", "top_k", mode="before")
    @classmethod
    def _none_is_all(cls, value: Any) -> Any:
        every = value is None or (isinstance(value, int) and value == -1)  # as TRL and vLLM have it
        return 0 if every else value

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _as_trl(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("loss_type")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        if value not in LOSSES:
            near = did_you_mean(value, LOSSES)
            if value.startswith(("rloo", "reinforce")):
                near = f" (advantage_estimator is {', '.join(ESTIMATORS)})"
            raise ValueError(f"should be one of {', '.join(LOSSES)}{near}")
        return value

    @field_validator("advantage_estimator")
    @classmethod
    def _known_estimator(cls, value: str) -> str:
        if value not in ESTIMATORS:
            near = did_you_mean(value, ESTIMATORS)
            raise ValueError(f"should be one of {', '.join(ESTIMATORS)}{near}")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> GrpoSettings:
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"weights should be one for each of {len(self.rewards)} rewards, not "
                f"{len(self.weights)}"
            )
        estimator = ESTIMATORS[self.advantage_estimator]
        if self.num_generations < estimator.least:
            raise ValueError(
                f"num_generations should be {estimator.least} or more, not {self.num_generations}: "
                f"advantage_estimator {self.advantage_estimator} compares completions of one "
                "prompt; with one each use reinforce_plus_plus"
            )
        if self.advantage_estimator != "grpo":
            self._only_by_default("multi_objective_aggregation", "advantage_estimator grpo")
        clips = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "luspo")
        if self.loss_type not in clips:
            self._only_by_default("delta", f"loss_type {', '.join(clips)}")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "epsilon_high should be given with loss_type cispo, whose ratios it bounds: 5.0 in "
                "the ScaleRL paper"
            )
        for kind in ("sapo", "vespo"):
            if self.loss_type != kind:
                for name in type(self).model_fields:
                    if name.startswith(f"{kind}_"):
                        self._only_by_default(name, f"loss_type {kind}")
        if self.rollouts != "vllm":
            for name in type(self).model_fields:
                if name.startswith("vllm_"):
                    self._only_by_default(name, "rollouts vllm")
        else:
            self._fits_vllm()
        if not self.converses:
            self._only_by_default("max_turns", "environment or tools")
            self._only_by_default("environment_timeout", "environment or tools")
        if not self.beta:
            self._only_by_default("use_bias_correction_kl", "beta above 0")
        if self.dynamic_sampling and self.num_generations == 1:
            raise ValueError(
                "dynamic_sampling compares the completions of a prompt: give num_generations 2 or "
                "more"
            )
        if not self.dynamic_sampling:
            self._only_by_default("max_resamples", "dynamic_sampling")
        return self

    def _fits_vllm(self) -> None:
        if self.num_iterations > 1 or self.steps_per_generation is not None:
            raise ValueError(
                "rollouts vllm learns completions once, in the step that samples them: leave out "
                "num_iterations and steps_per_generation"
            )
        if self.converses:
            raise ValueError(
                "rollouts should be engine with environment or tools: conversations are sampled "
                "by the resident model"
            )
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} cannot be set with rollouts vllm, whose log-probabilities would then "
                    "be of another distribution than the trainer's"
                )

    def _only_by_default(self, name: str, needs: str) -> None:
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"{name} has an effect with {needs} alone")
