"""Losses that the client computes: DPO over pairs, losses by handle, and errors in them."""

from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
import torch.nn.functional as F
from sdk_rows import datum, logprobs, plain_logprobs, with_peft
from test_numbers import saved
from tinker import types

from served import Running

CHOSEN, REJECTED = [3, 60, 21, 9, 14, 33], [3, 60, 21, 80, 7]
REFERENCE = -20.0, -12.5  # log-likelihoods of the two under the reference
BETA = 0.3


def dpo(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Of neighbours, the first one preferred (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    losses = []
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        margin = (chosen.sum() - REFERENCE[0]) - (rejected.sum() - REFERENCE[1])
        losses.append(-F.logsigmoid(BETA * margin))
    return torch.stack(losses).sum(), {"margin:mean": 1.0}


def test_dpo_over_pairs_and_the_step_after_it_are_those_of_torch_and_peft(
    client: Any, base: Path, state: Path
):
    run = client.create_lora_training_client("base", rank=4, seed=6, train_unembed=False).result()
    model = with_peft(base, saved(run, "start", state))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    adam = types.AdamParams(learning_rate=1e-2, eps=1e-8)
    for _ in range(2):
        passed = run.forward_backward_custom([datum(CHOSEN), datum(REJECTED)], dpo)
        stepped = run.optim_step(adam)  # before the loss is known
        plain = [plain_logprobs(model, row[:-1], row[1:]) for row in (CHOSEN, REJECTED)]
        wanted, _ = dpo(None, plain)
        assert passed.result().metrics["loss:sum"] == pytest.approx(wanted.item(), abs=1e-4)
        assert passed.result().metrics["margin:mean"] == 1.0
        stepped.result()
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    after = logprobs(run.forward([datum(CHOSEN), datum(REJECTED)], "cross_entropy").result())
    for found, row in zip(after, (CHOSEN, REJECTED), strict=True):
        with torch.no_grad():
            assert found.tolist() == pytest.approx(
                plain_logprobs(model, row[:-1], row[1:]).tolist(), abs=1e-4
            )


def _weighted(logprobs: Any, advantages: Any) -> Any:
    return -(logprobs.exp() * advantages).sum(), {"custom/p:mean": logprobs.exp().mean()}


def test_a_loss_by_handle_is_the_same_as_the_function(client: Any):
    handle = client.create_custom_loss(_weighted, {"logprobs": 1, "advantages": 1})
    handle = handle.result() if hasattr(handle, "result") else handle
    row = datum(REJECTED, advantages=[1.0, -0.5, 0.0, 2.0])

    def plain(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return _weighted(found[0], data[0].loss_fn_inputs["advantages"].to_torch())[0], {}

    results = []
    for loss in (handle, plain):
        run = client.create_lora_training_client("base", rank=2, seed=1).result()
        found = run.forward_backward_custom([row], loss).result()
        run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
        after = logprobs(run.forward([datum(REJECTED)], "cross_entropy").result())[0]
        results.append([found.metrics["loss:sum"], *after.tolist()])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_what_is_wrong_with_a_custom_loss_is_told_at_once_and_harms_no_other_client(
    client: Any, service: Running
):
    rows = [datum(CHOSEN)]

    def infinite(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return (found[0] * 1e38 * 1e38).sum(), {}

    def broken(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        raise KeyError("reference")

    def run_of() -> Any:
        return client.create_lora_training_client("base", rank=1, seed=1).result()

    with pytest.raises(tinker.RequestFailedError, match="weights must be finite") as refused:
        run_of().forward_backward_custom(rows, infinite).result(timeout=30)
    assert refused.value.category == types.RequestErrorCategory.User
    run = run_of()
    failed = run.forward_backward_custom(rows, broken)
    with pytest.raises(KeyError, match="reference"):
        failed.result(timeout=30)
    with pytest.raises(Exception, match="cannot accept further requests"):  # says the SDK
        run.optim_step(types.AdamParams()).result(timeout=30)
    good = run_of()
    with pytest.raises(tinker.RequestFailedError, match="forward_backward_custom takes a function"):
        good.forward_backward(rows, "custom", {"loss_id": "mine"}).result(timeout=30)
    assert good.forward_backward_custom(rows, dpo_of_one).result(timeout=30).metrics


def dpo_of_one(data: Any, found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -F.logsigmoid(found[0].sum()), {}
