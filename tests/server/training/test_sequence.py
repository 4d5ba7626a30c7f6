"""Requests of a model are executed in their order, however they arrive, and each once."""

import uuid
from typing import Any

import pytest
from sdk_rows import datum, logprobs
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk
from tinker.proto.request_conv import forward_backward_request_to_proto

from lorakit.server.training import tenants
from served import Running

ROW = [11, 7, 90, 33, 52]
KEY = {"X-API-Key": "tml-local"}


def body(
    model_id: str,
    seq_id: int,
    tokens: list[int] = ROW,
    loss: Any = "cross_entropy",
    **inputs: list[float],
) -> bytes:
    given = types.ForwardBackwardInput(data=[datum(tokens, **inputs)], loss_fn=loss)
    request = types.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, forward_backward_input=given
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def post(service: Running, path: str, content: Any) -> Any:
    if isinstance(content, bytes):
        return service.http.post(f"/api/v1/{path}", content=content, headers=KEY)
    return service.post(f"/api/v1/{path}", content, headers=KEY)


def result(service: Running, begun: Any) -> Any:
    answer = post(service, "retrieve_future", {"request_id": begun.json()["request_id"]})
    assert answer.status_code == 200
    if answer.headers["content-type"] == "application/json":
        return answer.json()
    return sdk.ForwardBackwardOutput.FromString(answer.content)


@pytest.fixture
def model_id(client: Any) -> str:
    return client.create_lora_training_client("base", rank=1, seed=1).result().get_info().model_id


def step(service: Running, model_id: str, seq_id: int, **adam: Any) -> Any:
    asked = {"model_id": model_id, "seq_id": seq_id, "type": "optim_step", "adam_params": adam}
    return post(service, "optim_step", asked)


def test_requests_that_arrive_in_another_order_or_twice_are_executed_in_theirs(
    service: Running, model_id: str
):
    third = step(service, model_id, 3, learning_rate=1e-2)
    second = post(service, "forward_backward", body(model_id, 2))
    first = post(service, "forward_backward", body(model_id, 1))
    again = post(service, "forward_backward", body(model_id, 1))
    assert first.json() == again.json()
    losses = [result(service, begun).metrics["loss:sum"] for begun in (first, second, again)]
    assert losses[0] == pytest.approx(losses[1])
    assert result(service, third)["metrics"]["grad_norm:mean"] > 0
    after = result(service, post(service, "forward_backward", body(model_id, 4)))
    assert after.metrics["loss:sum"] < losses[0]


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (lambda m: body(m, 1, loss="stable_reinforce"), "forward_backward"),
        (lambda m: body(m, 1, tokens=[1, 2, 99999]), "forward_backward"),
        (lambda m: body(m, 1, tokens=[5] * 9000), "forward_backward"),
        (lambda m: body(m, 1, loss="ppo"), "forward_backward"),
        (lambda m: body(m, 1, loss="gspo", logprobs=[-1.0] * 4, advantages=[1.0] * 4),
         "forward_backward"),
        (lambda m: {"model_id": m, "seq_id": 1, "adam_params": {"eps": -1}}, "optim_step"),
        (lambda m: {"model_id": m, "seq_id": 1, "optimizer_params": {}}, "optim_step"),
        (lambda m: {"model_id": m, "seq_id": 1, "path": "../../etc"}, "save_weights"),
        (lambda m: {"model_id": m, "seq_id": 1, "kind": "later",
                    "sampling_session_seq_id": 0}, "save_weights_for_sampler"),
        (lambda m: {"model_id": m, "seq_id": 1, "path": "tinker://x/weights/y",
                    "optimizer": True}, "load_weights"),
    ],
)  # fmt: skip
def test_a_request_that_fails_says_so_in_its_result_and_later_ones_go_on(
    service: Running, model_id: str, content: Any, path: str
):
    failed = result(service, post(service, path, content(model_id)))
    assert failed["category"] == "user"
    assert "\n" not in failed["error"]
    assert result(service, post(service, "forward_backward", body(model_id, 2))).metrics


def test_a_request_whose_predecessor_never_comes_fails_and_those_behind_it_go_on(
    service: Running, model_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tenants, "HOLE_SECONDS", 0.3)
    waits = [step(service, model_id, 4), post(service, "forward_backward", body(model_id, 3))]
    for begun in waits:
        failed = result(service, begun)
        assert failed["category"] == "user"
        assert "request 1 of this model did not come within 0.3 s" in failed["error"]
    monkeypatch.undo()
    later = [post(service, "forward_backward", body(model_id, seq_id)) for seq_id in (6, 5)]
    assert all(result(service, begun).metrics["loss:sum"] > 0 for begun in later)
    too_late = result(service, post(service, "forward_backward", body(model_id, 2)))
    assert "came too late" in too_late["error"]


def test_the_sdk_tells_a_user_error_from_others(client: Any):
    run = client.create_lora_training_client("base", rank=1).result()
    with pytest.raises(Exception, match="there is no loss 'nonsense'"):
        run.forward_backward([datum(ROW)], "nonsense").result()
    with pytest.raises(Exception, match="advantages"):
        run.forward_backward([datum(ROW)], "ppo").result()
    sampled = datum(ROW, logprobs=[-1.0] * 4, advantages=[1.0] * 4)
    with pytest.raises(Exception, match=r"datum 0.*clip_high_threshold"):
        run.forward_backward([sampled], "gspo", {"clip_low_threshold": 0.8}).result()
    assert len(logprobs(run.forward([datum(ROW)], "cross_entropy").result())[0]) == 4


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"not protobuf"])
def test_a_body_that_is_no_message_is_refused_at_once(service: Running, content: bytes):
    answer = post(service, "forward_backward", content)
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:  # an empty message is one, of no model
        assert result(service, answer)["category"] == "user"


def test_results_of_nobody_s_requests_are_not_waited_for(service: Running):
    answer = post(service, "retrieve_future", {"request_id": str(uuid.uuid4())})
    assert answer.status_code == 404
