"""Log-probabilities of sampling and of training agree where both do several things at once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit import LoraConfig
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import TokenizedRow
from lorakit.engine.resident import ResidentModel
from lorakit.engine.shared_pass import AdapterBatch, side_by_side
from lorakit.lora.routing import BASE, Route
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.models.loss import IGNORE, SupervisedLoss
from lorakit.objectives.grpo import Grpo
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.rl.engine_rollouts import EngineRollouts

TEMPERATURE, PAD = 0.7, 258
SYSTEM = [*range(65, 115)]
"""Tokens with which all prompts begin: enough for the sampler to read them once."""
PROMPTS = [[*SYSTEM, *range(40, 40 + n)] for n in (3, 9, 1, 20)]
ADAPTERS = ("long", "short", BASE)


@pytest.fixture(scope="module")
def sampled(attentive_folder: Path) -> tuple[ResidentModel, dict[str, list[Rollout]]]:
    """Two adapters beside the base, and three completions of each prompt by each of the three."""
    model, tokenizer = lorakit.load_model(attentive_folder, "float32")
    assert take_lines(model) is None
    assert take_prefixes(model)
    resident = ResidentModel(model, PAD)
    for name, rank, modules in (("long", 8, "all-linear"), ("short", 2, ["q_proj", "o_proj"])):
        config = LoraConfig(r=rank, target_modules=modules, init_lora_weights=False)
        resident.create(name, config, seed=rank)
    given = {"max_new_tokens": 24, "temperature": TEMPERATURE, "top_p": 0.9, "logprobs": True}
    asked = [
        AskedPrompt(prompt, seed=100 * p + k, generation=k, **given)
        for p, prompt in enumerate(PROMPTS)
        for _ in ADAPTERS
        for k in range(3)
    ]
    names = [name for _ in PROMPTS for name in ADAPTERS for _ in range(3)]
    source = EngineRollouts(Grpo(rewards=["exact_match"]), tokenizer)
    written = source.write_each(asked, names, resident.model)
    of_each = {
        name: [one for one, own in zip(written, names, strict=True) if own == name]
        for name in ADAPTERS
    }
    return resident, of_each


@pytest.mark.parametrize(
    "collate",
    [
        pytest.param(LineCollator(share_prefixes=True), id="prefixes"),
        pytest.param(LineCollator(), id="packed"),
        pytest.param(Collator(PAD), id="padded"),
    ],
)
def test_mixed_adapters_temperature_and_top_p_leave_no_gap(
    sampled: tuple[ResidentModel, dict[str, list[Rollout]]],
    collate: Callable[[Sequence[TokenizedRow]], dict[str, Any]],
):
    """The completions of two adapters and of the base, in one pass of all of them."""
    resident, of_each = sampled
    told: list[float] = []
    batches = []
    for name, rollouts in of_each.items():
        rows = []
        for i, one in enumerate(rollouts):
            prompt = PROMPTS[i // 3]
            labels = [IGNORE] * len(prompt) + [*one.tokens]
            rows.append(TokenizedRow([*prompt, *one.tokens], labels, "rows"))
            told += one.logprobs
        batches.append(AdapterBatch(name, collate(rows)))
    whole, route = side_by_side(batches, PAD)
    resident.model.eval()
    with resident.model.routing.using(Route()):  # sampling leaves that of its rows behind
        reader = SupervisedLoss(resident.model, temperature=TEMPERATURE)
        untempered = SupervisedLoss(resident.model)
    with resident.model.routing.using(route), torch.no_grad():
        own = -reader.of_tokens(resident.model, whole)
    gap = (own - torch.tensor(told)).abs()
    assert len(gap) > 300
    assert gap.max() <= 1e-4
    # Of another adapter, or at another temperature, they would be others.
    with resident.model.routing.using(route), torch.no_grad():
        plain = -untempered.of_tokens(resident.model, whole)
    assert (plain - own).abs().max() > 0.1
    assert [o.tokens for o in of_each["long"]] != [o.tokens for o in of_each["short"]]
