"""GRPO's advantages, losses, gradients and metrics are those of TRL's trainer, to 1e-9.

Given completions go through TRL's `_generate_and_score_completions` and `_compute_loss` on a PEFT
model in float64, and through `Grpo` on the same model of lorakit, in one line with shared prompts,
padded, and divided into batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftConfig
from transformers import AutoModelForCausalLM

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.prompt_tokens import prompt_row
from lorakit.data.samples import Sample
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.objectives.batch_sums import added
from lorakit.objectives.completion_rows import CompletionGroup, completion_row
from lorakit.objectives.grpo import Grpo
from lorakit.objectives.rollout import Rollout
from lorakit.rewards.rewards import Rewards
from tiny import byte_tokenizer, make_attentive
from trl_peer import LORA, assert_same, in_float64, loss_of_lorakit, loss_of_trl

pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer

PAD, END = 258, 257
TEMPERATURE, SIZE, MOST = 0.7, 3, 32
PROMPTS = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in (2, 3)]
TEXTS = ["It is 4.", "4", "I do not know it at all", "6!", "It is six", "Ask me again"]
CUT_OFF = 2
"""The completion without an end."""

Scores = list[float | None]
RIGHT: Scores = [1.0, 0.5, 0.0, 0.25, 1.0, 0.0]
SHORT: Scores = [0.5, 1.0, None, 1.0, None, 0.5]


def tokens_of(i: int, tokenizer: Any) -> list[int]:
    ids = tokenizer(TEXTS[i], add_special_tokens=False)["input_ids"]
    return [*ids, *([] if i == CUT_OFF else [END])]


def reward(name: str, values: Scores) -> Callable[..., Scores]:
    def given(completions: Sequence[Any], **columns: Any) -> Scores:
        return [values[TEXTS.index(one[0]["content"])] for one in completions]

    given.__name__ = name
    return given


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Model and TRL in float64 throughout."""
    with in_float64():
        yield


def attentive(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    make_attentive(model)
    return model


def rolled_out(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    tokenizer = trainer.processing_class
    ids = [
        tokenizer(
            tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        for one in prompts
    ]
    completions = [tokens_of(i, tokenizer) for i in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer, whose completions are given."""
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(TEXTS),
        num_generations=SIZE,
        max_completion_length=MOST,
        temperature=TEMPERATURE,
    )
    trainer = GRPOTrainer(
        model=attentive(tiny_model),
        reward_funcs=[reward("right", RIGHT), reward("short", SHORT)],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": one} for one in PROMPTS]),
        processing_class=byte_tokenizer(),
        peft_config=PeftConfig(**LORA),
        rollout_func=rolled_out,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def ours(theirs: Any, tiny_model: Path) -> LoraModel:
    base = attentive(tiny_model)
    model = LoraModel(base, LoraConfig(**LORA)).double()
    own = dict(model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        if "lora_" in name:
            own[name].data = parameter.data.clone()
    assert take_lines(base) is None
    assert take_prefixes(base)
    return model.train()


_OF_TRAINER = {
    "loss_type": "loss_type",
    "beta": "beta",
    "scale_rewards": "scale_rewards",
    "importance_sampling_level": "importance_sampling_level",
    "mask_truncated_completions": "mask_truncated_completions",
    "multi_objective_aggregation": "multi_objective_aggregation",
    "off_policy_mask_threshold": "off_policy_mask_threshold",
}


def of_trl(trainer: Any, settings: dict[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """TRL's batch of the given completions, under these settings; with old log-probabilities."""
    usual = Grpo(loss_type="grpo").settings
    values = usual.model_dump() | {"scale_rewards": "group"} | settings
    for name, own in _OF_TRAINER.items():
        setattr(trainer, own, values[name])
    trainer.epsilon_low = values["epsilon"]
    trainer.epsilon_high = values["epsilon_high"] or values["epsilon"]
    trainer.args.delta = values["delta"]
    trainer.args.use_bias_correction_kl = values["use_bias_correction_kl"]
    trainer.reward_weights = torch.tensor(weights)
    trainer.top_entropy_quantile = values["top_entropy_quantile"]
    trainer.entropy_coef = values["entropy_coef"]
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0
    for metrics in trainer._metrics.values():
        metrics.clear()
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [{"prompt": one} for one in PROMPTS for _ in range(SIZE)]
    )
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].size(1),
        )
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(5))
    batch["old_per_token_logps"] = now + 0.4 * noise
    return batch


def groups_of(objective: Grpo, tokenizer: Any, old: torch.Tensor) -> list[Any]:
    """Our rows of the given completions, a list for each prompt."""
    answer = {"role": "assistant", "content": ""}
    samples = [
        Sample((*one, answer), None, f"rows:{i}", columns={"prompt": one})
        for i, one in enumerate(PROMPTS)
    ]
    rows = objective.together([prompt_row(one, tokenizer, 256) for one in samples], 256)
    batch = objective.to_batch(rows, Collator(PAD))
    sampling = objective.sampled_rows([batch], 0)
    asked = next(sampling)
    assert len({one.seed for one in asked}) == len(TEXTS)
    written = []
    for i, text in enumerate(TEXTS):
        tokens = tokens_of(i, tokenizer)
        logprobs = old[i, : len(tokens)].tolist()
        written.append(Rollout(tokens, logprobs, "length" if i == CUT_OFF else "stop", text))
    with pytest.raises(StopIteration) as ended:
        sampling.send(written)
    [found] = ended.value.value
    return [group.again() for group in found]  # by other weights than those of now


def objective_of(
    settings: dict[str, Any], weights: Sequence[float], rewards: Sequence[Any]
) -> Grpo:
    common = {"num_generations": SIZE, "max_completion_length": MOST, "temperature": TEMPERATURE}
    objective = Grpo(**{"loss_type": "grpo"} | common | settings)
    objective.rewards = Rewards.opened([*rewards], [*weights])
    return objective


REWARDS = (reward("right", RIGHT), reward("short", SHORT))

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, two-sided": {"epsilon_high": 0.28, "delta": 1.5},
    "grpo, with KL": {"beta": 0.3},
    "grpo, with plain KL": {"beta": 0.3, "use_bias_correction_kl": False},
    "grpo, masked": {"mask_truncated_completions": True},
    "grpo, of the batch": {"scale_rewards": "batch"},
    "grpo, off-policy mask": {"off_policy_mask_threshold": 0.02},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, masked": {"loss_type": "dapo", "mask_truncated_completions": True, "beta": 0.1},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "without a reward": {"beta": 0.1},
    "a group without signal": {"loss_type": "dapo"},
    "a group without signal, averaged": {},
    "each reward normalised": {"multi_objective_aggregation": "normalize_then_sum"},
    "grpo, entropy bonus": {"entropy_coef": 0.05},
    "a group without signal, entropy bonus": {"entropy_coef": 0.05, "loss_type": "dr_grpo"},
    "dapo, uncertain tokens": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "beta": 0.1},
    "uncertain tokens with a bonus": {"top_entropy_quantile": 0.5, "entropy_coef": -0.02},
}


@pytest.mark.parametrize("case", CASES)
def test_advantages_loss_gradients_and_metrics_are_trls(case: str, theirs: Any, ours: LoraModel):
    settings, weights = CASES[case], (1.0, 0.5)
    none = case == "without a reward"  # of the third completion, from any function
    RIGHT[2] = None if none else 0.0
    idle = case.startswith("a group without signal")
    RIGHT[3:] = [0.5, 1.0, 0.75] if idle else [0.25, 1.0, 0.0]
    batch = of_trl(theirs, settings, weights)
    expected = loss_of_trl(theirs, batch)
    metrics = {name: values[0] for name, values in theirs._metrics["train"].items() if values}
    own = dict(settings)
    if case == "gspo":  # which is that level of the ratio by another name
        own = {"loss_type": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4}
    objective = objective_of(own, weights, REWARDS)
    old = batch["old_per_token_logps"]
    groups = groups_of(objective, theirs.processing_class, old)
    found = torch.tensor([row.advantage for group in groups for row in group.parts])
    assert (found - batch["advantages"]).abs().max() < 1e-9
    for collate in (LineCollator(share_prefixes=True), Collator(PAD)):
        for parts in ([groups], [[one] for one in groups]):
            batches = [objective.to_batch(some, collate) for some in parts]
            assert_same(loss_of_lorakit(ours, objective, batches), expected)
    forward = objective.forward(ours)
    sums: dict[str, torch.Tensor] = {}
    for part in groups:
        one = objective.to_batch([part], Collator(PAD))
        sums = added(sums, objective.loss(forward, one).sums())
    logged = objective.held_out(sums)
    names = {*metrics} & {*objective.logged}
    assert len(names) >= 12
    for name in names:
        if name == "frac_reward_zero_std" and "batch" in str(settings) + case:
            continue  # TRL's is of the batch then
        if name == "entropy" and idle and "entropy_coef" not in settings:
            continue  # of the group that is not computed it is estimated
        if name.startswith("clip_ratio") and case in ("gspo", "luspo"):
            continue  # TRL's is a share of completions then, and ours of tokens
        if name in logged:
            assert logged[name] == pytest.approx(metrics[name], abs=1e-6), name


@pytest.mark.parametrize("case", ["dapo", "gspo", "cispo", "vespo"])
def test_on_the_weights_that_sampled_the_ratio_is_one_as_trls(
    case: str, theirs: Any, ours: LoraModel
):
    """Whatever rounding the sampler's log-probabilities have."""
    batch = of_trl(theirs, CASES[case], (1.0, 0.5))
    old = batch.pop("old_per_token_logps")
    expected = loss_of_trl(theirs, batch)
    objective = objective_of(CASES[case], (1.0, 0.5), REWARDS)
    groups = groups_of(objective, theirs.processing_class, old)
    fresh = [replace(group, fresh=True) for group in groups]
    one = objective.to_batch(fresh, LineCollator(share_prefixes=True))
    assert_same(loss_of_lorakit(ours, objective, [one]), expected)


@pytest.mark.parametrize("layout", ["line", "padded"])
def test_an_environments_tokens_are_read_and_not_learned(layout: str, theirs: Any, ours: LoraModel):
    """A batch in which TRL's `tool_mask` leaves tokens out."""
    batch = of_trl(theirs, {}, (1.0, 0.0))
    lengths = batch["completion_mask"].sum(1)
    mask = torch.ones_like(batch["completion_mask"])
    mask[0, 2:5] = mask[4, :3] = 0
    batch["tool_mask"] = mask
    expected = loss_of_trl(theirs, batch)
    objective = objective_of({}, (1.0, 0.0), REWARDS)
    rows = groups_of(objective, theirs.processing_class, batch["old_per_token_logps"])
    groups = []
    for g, group in enumerate(rows):
        parts = []
        for k, row in enumerate(group.parts):
            i = g * SIZE + k
            size = int(lengths[i])
            old = batch["old_per_token_logps"][i, :size].tolist()
            rollout = Rollout(row.input_ids[-size:], old, sampled=mask[i, :size].bool().tolist())
            prompt = replace(row, input_ids=row.input_ids[:-size], labels=row.labels[:-size])
            worth = {name: getattr(row, name) for name in ("rewards", "reward", "advantage")}
            parts.append(completion_row(prompt, rollout, False, **worth))
        groups.append(replace(CompletionGroup.of(*parts), number=g, fresh=False))
    collate = LineCollator(share_prefixes=True) if layout == "line" else Collator(PAD)
    one = objective.to_batch(groups, collate)
    assert_same(loss_of_lorakit(ours, objective, [one]), expected)
