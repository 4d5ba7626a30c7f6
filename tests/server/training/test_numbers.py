"""What the service computes is what plain torch and PEFT compute, by the real SDK."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdk_rows import datum, logprobs, plain_logprobs, with_peft
from tinker import types

LONG = [11, 7, 90, 33, 52, 8, 100, 7, 41, 19, 77, 5]
SHORT = [3, 60, 21, 9, 14]
Q = [-1.0, -2.0, -0.5, -3.0]
A = [1.0, -0.5, 0.0, 2.0]


def ppo(lp: Any, q: Any, a: Any) -> Any:
    r = (lp - q).exp()
    return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum()


LOSSES: dict[str, tuple[dict[str, float], Callable[[Any, Any, Any], Any]]] = {
    "importance_sampling": ({}, lambda lp, q, a: -((lp - q).exp() * a).sum()),
    "ppo": ({}, ppo),
    "cispo": (
        {},
        lambda lp, q, a: -((lp.detach() - q).exp().clamp(0.0, 4.0) * lp * a).sum(),
    ),
    "dro": ({"beta": 0.05}, lambda lp, q, a: -(lp * a - 0.025 * (lp - q) ** 2).sum()),
}


def saved(run: Any, name: str, state: Path) -> Path:
    """The folder of a checkpoint of a run as it is now."""
    path = run.save_state(name).result().path.removeprefix("tinker://").replace(":", "+")
    return state / "runs" / path


@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_loss_and_the_step_after_it_are_those_of_torch_and_peft(
    client: Any, base: Path, state: Path, name: str
):
    settings, loss = LOSSES[name]
    run = client.create_lora_training_client("base", rank=4, seed=5, train_unembed=False).result()
    run.forward_backward([datum(LONG)], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    model = with_peft(base, saved(run, "before", state))
    rows = [datum(SHORT, logprobs=Q, advantages=A)]
    found = run.forward_backward(rows, name, settings or None).result()
    run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
    after = run.forward([datum(SHORT)], "cross_entropy").result()

    lp = plain_logprobs(model, SHORT[:-1], SHORT[1:])
    wanted = loss(lp, torch.tensor(Q), torch.tensor(A))
    assert logprobs(found)[0].tolist() == pytest.approx(lp.tolist(), abs=1e-5)
    assert found.metrics["loss:sum"] == pytest.approx(float(wanted), abs=1e-5)
    # Adam's state is that of the first step, which PEFT did not make: only gradients compare.
    wanted.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert logprobs(after)[0].tolist() != pytest.approx(lp.tolist(), abs=1e-5)


def test_cross_entropy_takes_weights_of_any_sign_and_a_step_is_torch_s_adamw(
    client: Any, base: Path, state: Path
):
    run = client.create_lora_training_client("base", rank=4, seed=6, train_unembed=False).result()
    model = with_peft(base, saved(run, "start", state))
    weights = [1.0, 0.0, -0.5, 2.5]
    rows = [datum(SHORT, weights=weights), datum(LONG)]
    adam = types.AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-2, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    for _ in range(2):
        found = run.forward_backward(rows, "cross_entropy").result()
        run.optim_step(adam).result()
        short, long = (plain_logprobs(model, r[:-1], r[1:]) for r in (SHORT, LONG))
        wanted = -(short * torch.tensor(weights)).sum() - long.sum()
        assert found.metrics["loss:sum"] == pytest.approx(float(wanted), abs=1e-4)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    after = logprobs(run.forward([datum(LONG)], "cross_entropy").result())[0]
    with torch.no_grad():
        wanted_after = plain_logprobs(model, LONG[:-1], LONG[1:])
    assert after.tolist() == pytest.approx(wanted_after.tolist(), abs=1e-4)


def test_two_calls_add_up_to_one_forward_adds_nothing_and_custom_losses_are_the_same(client: Any):
    rows = [datum([*LONG[i:], *LONG[:i]]) for i in range(4)]

    def train(how: Callable[[Any], None]) -> list[float]:
        run = client.create_lora_training_client("base", rank=2, seed=1).result()
        how(run)
        run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
        return logprobs(run.forward(rows[:1], "cross_entropy").result())[0].tolist()

    def in_two(run: Any) -> None:
        first = run.forward_backward(rows[:2], "cross_entropy")
        run.forward(rows, "cross_entropy").result()
        run.forward_backward(rows[2:], "cross_entropy").result()
        first.result()

    def custom(run: Any) -> None:
        def loss(data: Any, lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            return -sum(lp.sum() for lp in lps), {}

        run.forward_backward_custom(rows, loss).result()

    at_once = train(lambda run: run.forward_backward(rows, "cross_entropy").result())
    assert train(in_two) == pytest.approx(at_once, abs=1e-5)
    assert train(custom) == pytest.approx(at_once, abs=1e-5)


def test_targets_need_not_be_the_row_s_own_tokens(client: Any, base: Path, state: Path):
    run = client.create_lora_training_client("base", rank=2, seed=1, train_mlp=False).result()
    other = [60, 61, 62, 63]
    found = logprobs(run.forward([datum(SHORT[:-1], other)], "cross_entropy").result())[0]
    with torch.no_grad():
        wanted = plain_logprobs(with_peft(base, saved(run, "other", state)), SHORT[:-1], other)
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_sampler_has_the_trainer_s_log_probabilities_and_keeps_its_weights(client: Any):
    run = client.create_lora_training_client("base", rank=4, seed=2).result()
    for _ in range(2):
        run.forward_backward([datum(LONG)], "cross_entropy").result()
        run.optim_step(types.AdamParams(learning_rate=3e-2)).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(SHORT)
    params = types.SamplingParams(max_tokens=6, temperature=0.7, seed=9, stop=[])
    [one] = sampler.sample(prompt, 1, params).result().sequences
    assert len(one.tokens) == 6
    assert one.stop_reason == "length"
    whole = [*SHORT, *one.tokens]
    trained = logprobs(run.forward([datum(whole)], "cross_entropy").result())[0]
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
    assert scored[0] is None
    assert scored[1:] == pytest.approx(trained.tolist(), abs=1e-4)
    cold = types.SamplingParams(max_tokens=6, temperature=1.0, seed=9, stop=[])
    [warm] = sampler.sample(prompt, 1, cold).result().sequences
    own = logprobs(run.forward([datum([*SHORT, *warm.tokens])], "cross_entropy").result())[0]
    assert warm.logprobs == pytest.approx(own[len(SHORT) - 1 :].tolist(), abs=1e-4)
    # Training goes on, and the snapshot stays.
    run.forward_backward([datum(LONG)], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-1)).result()
    assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == one.tokens
    assert sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result() == scored
    changed = logprobs(run.forward([datum(whole)], "cross_entropy").result())[0]
    assert changed.tolist() != pytest.approx(trained.tolist(), abs=1e-2)
