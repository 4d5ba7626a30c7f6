"""What the service computes is what plain torch and PEFT compute, by the real SDK."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from sdk_rows import datum, logprobs, plain_logprobs, tensor, with_peft
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


def test_ppo_s_thresholds_may_be_a_row_s_own(client: Any, base: Path, state: Path):
    run = client.create_lora_training_client("base", rank=1, seed=1, train_mlp=False).result()
    low, high = [0.5, 0.9, 0.0, 0.99], [1.1, 1.5, 9.0, 1.01]
    bounds = {"clip_low_threshold": low, "clip_high_threshold": high}
    plain = datum(SHORT, logprobs=Q, advantages=A)
    rows = [plain, datum(SHORT, logprobs=Q, advantages=A, **bounds)]
    found = [
        run.forward_backward([row], "ppo", {"clip_low_threshold": 0.7}).result().metrics["loss:sum"]
        for row in rows
    ]
    with torch.no_grad():
        lp = plain_logprobs(with_peft(base, saved(run, "bounds", state)), SHORT[:-1], SHORT[1:])
    r, a = (lp - torch.tensor(Q)).exp(), torch.tensor(A)
    wanted = [
        -torch.minimum(r * a, r.clamp(lo, hi) * a).sum()
        for lo, hi in ((torch.tensor(0.7), torch.tensor(1.2)), map(torch.tensor, (low, high)))
    ]
    assert found == pytest.approx([float(value) for value in wanted], abs=1e-5)


@pytest.mark.parametrize("train_unembed", [True, False])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_soft_targets_are_k_tokens_a_position_and_a_step_is_torch_s(
    client: Any, base: Path, state: Path, form: str, train_unembed: bool
):
    run = client.create_lora_training_client(
        "base", rank=4, seed=6, train_unembed=train_unembed
    ).result()
    model = with_peft(base, saved(run, "start", state))
    draw = torch.Generator().manual_seed(3)
    targets = torch.randint(1, 250, (4, 8), generator=draw)
    weights = torch.rand(4, 8, generator=draw)
    targets[:, 3:], weights[:, 3:] = 0, 0
    targets[2, 1:], weights[2, 1:] = 0, 0
    weights[1, 0] = -0.5
    tensors = {"target_tokens": targets, "weights": weights}
    if form == "dense":
        tensors = {name: types.TensorData.from_torch(value) for name, value in tensors.items()}
    row = types.Datum(model_input=types.ModelInput.from_ints(SHORT[:-1]), loss_fn_inputs=tensors)
    assert (row.loss_fn_inputs["weights"].sparse_crow_indices is None) == (form == "dense")
    rows = [datum(LONG), row, datum(SHORT)]
    adam = types.AdamParams(learning_rate=1e-2, eps=1e-8)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-2, betas=(adam.beta1, adam.beta2), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    for _ in range(2):
        found = run.forward_backward(rows, "cross_entropy").result()
        run.optim_step(adam).result()
        logs = model(input_ids=torch.tensor([SHORT[:-1]])).logits[0].log_softmax(-1)
        lp = logs.gather(1, targets)
        wanted = -(lp * weights).sum()
        for tokens in (LONG, SHORT):
            wanted = wanted - plain_logprobs(model, tokens[:-1], tokens[1:]).sum()
        own = found.loss_fn_outputs[1]["logprobs"]
        assert own.shape == [4, 8]
        assert own.data == pytest.approx(lp.flatten().tolist(), abs=1e-4)
        assert len(logprobs(found)[2]) == 4
        assert found.metrics["loss:sum"] == pytest.approx(float(wanted), abs=1e-3)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    after = logprobs(run.forward([datum(LONG)], "cross_entropy").result())[0]
    with torch.no_grad():
        wanted_after = plain_logprobs(model, LONG[:-1], LONG[1:])
    assert after.tolist() == pytest.approx(wanted_after.tolist(), abs=1e-4)


def test_a_custom_loss_gets_k_log_probabilities_a_position(client: Any):
    targets = torch.tensor([[5, 9], [7, 8], [1, 2], [14, 3]])
    weights = torch.tensor([[0.5, 0.25], [1.0, -0.5], [0.0, 2.0], [0.3, 0.3]])
    given = {"target_tokens": targets, "weights": weights}
    tensors = {name: types.TensorData.from_torch(value) for name, value in given.items()}
    row = types.Datum(model_input=types.ModelInput.from_ints(SHORT[:-1]), loss_fn_inputs=tensors)

    def custom(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -(found[0] * weights).sum(), {}

    after = []
    for loss in ("cross_entropy", custom):
        run = client.create_lora_training_client("base", rank=2, seed=1).result()
        if callable(loss):
            run.forward_backward_custom([row], loss).result()
        else:
            run.forward_backward([row], loss).result()
        run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
        after += [logprobs(run.forward([datum(LONG)], "cross_entropy").result())[0].tolist()]
    assert after[0] == pytest.approx(after[1], abs=1e-5)


def test_a_row_in_several_chunks_is_the_row(client: Any):
    run = client.create_lora_training_client("base", rank=1, seed=1).result()
    parts = LONG[:3], LONG[3:4], [], LONG[4:]
    chunks = [types.EncodedTextChunk(tokens=part) for part in parts]
    target_tokens = tensor([*LONG[1:], 9], "int64")
    several, whole = (
        types.Datum(model_input=given, loss_fn_inputs={"target_tokens": target_tokens})
        for given in (types.ModelInput(chunks=chunks), types.ModelInput.from_ints(LONG))
    )
    found, wanted = logprobs(run.forward([several, whole], "cross_entropy").result())
    assert found.tolist() == pytest.approx(wanted.tolist())


def test_where_tokens_come_from_changes_nothing(client: Any):
    run = client.create_lora_training_client("base", rank=1, seed=1).result()
    plain = datum(SHORT, logprobs=Q, advantages=A)
    span = types.SampledProvenanceSpan(sequence_id="session:sample:0:1:0", length=4)
    told = plain.with_provenance(model_input=[span], loss_fn_inputs=[span])
    found = [run.forward_backward([row], "ppo").result() for row in (plain, told)]
    assert found[0].metrics["loss:sum"] == found[1].metrics["loss:sum"]


def test_soft_targets_that_do_not_fit_are_refused(client: Any):
    run = client.create_lora_training_client("base", rank=1).result()
    two = types.TensorData.from_torch(torch.ones(4, 2, dtype=torch.int64))

    def row(**inputs: Any) -> Any:
        given = types.ModelInput.from_ints(SHORT[:-1])
        return types.Datum(model_input=given, loss_fn_inputs={"target_tokens": two, **inputs})

    fours = tensor([1.0] * 4, "float32")
    wide = types.TensorData.from_torch(torch.ones(4, 1025, dtype=torch.int64))
    bomb = types.TensorData(
        data=[1], dtype="int64", shape=[4, 2**40], sparse_crow_indices=[0, 1, 1, 1, 1],
        sparse_col_indices=[0],
    )  # fmt: skip
    for message, given, loss in (
        (r"weights must be finite numbers of shape \(4, 2\)", row(weights=fours), "cross_entropy"),
        (r"takes target_tokens \(N,\)", row(logprobs=fours, advantages=fours), "ppo"),
        (r"K up to 1024", row(target_tokens=wide), "cross_entropy"),
        (r"cells", row(target_tokens=bomb), "cross_entropy"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=message):
            run.forward_backward([given], loss).result()
