"""Many adapters trained on one resident base: each is what it would be alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakit import LoraConfig
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.resident import ResidentModel
from lorakit.engine.token_losses import AdapterRow
from lorakit.errors import InputError
from lorakit.lora.routing import BASE

CONFIGS = {
    "plain": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dropped": LoraConfig(
        r=5, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False
    ),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["v_proj"], init_lora_weights=False),
    "head": LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
}
STEP = AdamW(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


def rows_of(name: str, count: int = 3) -> list[AdapterRow]:
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    found = []
    for i in range(count):
        ids = torch.randint(0, 250, (5 + 3 * i,), generator=draw).tolist()
        found.append(AdapterRow(name, ids, [-100, -100, *ids[2:]]))
    return found


def resident(base: Any, *names: str) -> ResidentModel:
    made = ResidentModel(base)
    for i, name in enumerate(names):
        made.create(name, CONFIGS[name], seed=i if len(names) > 1 else list(CONFIGS).index(name))
    return made


def gradients(model: ResidentModel, name: str) -> dict[str, torch.Tensor]:
    return {key: p.grad.clone() for key, p in model.trained(name).items() if p.grad is not None}


def mixed(*names: str) -> list[AdapterRow]:
    """Rows of all, one of each in turn."""
    return [row for several in zip(*map(rows_of, names), strict=True) for row in several]


@pytest.mark.parametrize("form", ["lines", "padded", "in passes of 20 tokens"])
def test_each_adapters_gradients_and_logprobs_are_those_that_it_gets_alone(
    base: Any, form: str, monkeypatch: pytest.MonkeyPatch
):
    if form == "padded":
        monkeypatch.setattr("lorakit.models.lines.take_lines", lambda model: "padding is tested")
    most = 20 if "20" in form else None
    together = resident(base, *CONFIGS)
    rows = mixed(*CONFIGS)
    # Dropout is drawn anew for each pass: in passes of few tokens it is not that of one.
    rows = [row for row in rows if not (most and row.adapter == "dropped")]
    found = together.forward_backward(rows, max_tokens=most)
    own = {name: gradients(together, name) for name in {row.adapter for row in rows}}
    for name in CONFIGS:
        together.remove(name)
    assert not any("lora" in name for name, _ in base.named_modules())
    for name, gradient in own.items():
        alone = resident(base, name)
        wanted = alone.forward_backward(rows_of(name))
        for key, value in gradients(alone, name).items():
            torch.testing.assert_close(gradient[key], value, rtol=1e-9, atol=1e-12)
        mine = [p for p, row in zip(found.logprobs, rows, strict=True) if row.adapter == name]
        for part, other in zip(mine, wanted.logprobs, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
        alone.remove(name)


def test_two_calls_accumulate_what_one_call_gives(base: Any):
    model = resident(base, "plain", "dora")
    rows = mixed("plain", "dora")
    whole = model.forward_backward(rows)
    wanted = gradients(model, "plain")
    model.optim_step("plain", AdamW(learning_rate=0.0))
    parts = [model.forward_backward(rows[:3]), model.forward_backward(rows[3:])]
    assert sum(part.metrics["loss"] for part in parts) == pytest.approx(whole.metrics["loss"])
    for key, value in gradients(model, "plain").items():
        torch.testing.assert_close(value, wanted[key])


def test_a_step_changes_one_adapter_and_a_saved_one_is_resumed_exactly(base: Any, tmp_path: Path):
    model = resident(base, "plain", "dropped")
    rows = mixed("plain", "dropped")
    for _ in range(2):
        model.forward_backward(rows)
        still = {key: p.detach().clone() for key, p in model.trained("dropped").items()}
        assert model.optim_step("plain", STEP)["grad_norm"] > 0.5
        assert all(p.equal(still[key]) for key, p in model.trained("dropped").items())
        assert gradients(model, "plain") == {}
        model.optim_step("dropped", STEP)
    model.save("plain", tmp_path / "plain")
    model.load("again", tmp_path / "plain")
    again = [AdapterRow("again", row.input_ids, row.labels) for row in rows_of("plain")]
    for _ in range(2):
        model.forward_backward([*rows_of("plain"), *again])
        norms = [model.optim_step(name, STEP)["grad_norm"] for name in ("plain", "again")]
        assert norms[0] == pytest.approx(norms[1])
    for key, p in model.trained("plain").items():
        torch.testing.assert_close(p, model.trained("again")[key], rtol=1e-12, atol=1e-15)


def test_training_lowers_the_loss_and_forward_sees_the_trained_weights(base: Any):
    model = resident(base, "plain")
    rows = rows_of("plain")
    bare = model.forward([AdapterRow(BASE, r.input_ids, r.labels) for r in rows]).logprobs
    before = model.forward_backward(rows).metrics
    assert before["tokens"] == sum(len(row.input_ids) - 2 for row in rows)
    for _ in range(8):
        model.optim_step("plain", AdamW(learning_rate=2e-2))
        after = model.forward_backward(rows).metrics
    assert after["loss"] < before["loss"]
    seen = model.forward(rows).logprobs
    assert -sum(float(p.sum()) for p in seen) == pytest.approx(after["loss"])
    assert not torch.equal(seen[0], bare[0])


def test_a_loss_of_ones_own_gets_log_probabilities_and_the_rows_inputs(base: Any):
    model = resident(base, "plain", "dora")
    rows = mixed("plain", "dora")
    logprobs = model.forward(rows).logprobs
    sampled = [
        AdapterRow(
            row.adapter,
            row.input_ids,
            row.labels,
            {"logprobs": [0.0, 0.0, *own.tolist()], "advantages": [2.0] * len(row.input_ids)},
        )
        for row, own in zip(rows, logprobs, strict=True)
    ]

    def importance_sampling(lp: torch.Tensor, row: AdapterRow) -> torch.Tensor:
        ratio = (lp - row.learned("logprobs", lp)).exp()
        return -(ratio * row.learned("advantages", lp)).sum()

    found = model.forward_backward(sampled, importance_sampling)
    assert found.losses == pytest.approx([-2.0 * len(own) for own in logprobs])
    ratio_one = gradients(model, "plain")
    model.optim_step("plain", AdamW(learning_rate=0.0))
    weighted = [
        AdapterRow(r.adapter, r.input_ids, r.labels, {"weights": [2.0] * len(r.input_ids)})
        for r in rows
    ]
    model.forward_backward(weighted)
    # Where the policy is the sampler, both are 2 times the gradient of the log-likelihood.
    for key, value in gradients(model, "plain").items():
        torch.testing.assert_close(value, ratio_one[key])


def test_what_cannot_be_done_is_refused(base: Any):
    model = resident(base, "plain")
    rows = rows_of("plain")
    for wrong, names in (
        (lambda: model.create("plain", CONFIGS["dora"]), "plain"),
        (lambda: model.forward_backward(rows_of("plian")), "did you mean"),
        (lambda: model.forward_backward(rows_of(BASE)), "not trained"),
        (lambda: model.optim_step("plain", STEP), "no gradients"),
        (lambda: model.forward_backward([AdapterRow("plain", [1, 2], [3, -100])]), "no token"),
        (lambda: AdapterRow("plain", [1, 2], [3]), "labels: 1 values"),
        (lambda: model.forward_backward(rows, lambda lp, row: row.learned("q", lp)), "needs q"),
        (lambda: model.create("b", LoraConfig(init_lora_weights="loftq")), "loftq"),
    ):
        with pytest.raises(InputError, match=names):
            wrong()
    assert model.adapters == ["plain"]
