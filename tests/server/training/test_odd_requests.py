"""Requests as clients have sent them elsewhere: empty, with pictures, of a rank or flags of note.

Each is answered as it should be or fails in words, and the model goes on.
"""

from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from sdk_rows import datum, logprobs, tensor
from test_sequence import post, result
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.engine.engine import Engine
from lorakit.server.training.lora_parts import LoraParts
from lorakit.server.training.messages import Lora
from served import Running

ROW = [11, 7, 90, 33, 52]
PNG = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)


@pytest.fixture(scope="module")
def tied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose output layer is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    """A model that has made a step."""
    made = client.create_lora_training_client("base", rank=2, seed=1).result()
    made.forward_backward([datum(ROW)], "cross_entropy").result()
    made.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return made


def test_a_request_without_rows_adds_nothing_and_a_row_without_tokens_is_refused(
    service: Running, client: Any
):
    run = client.create_lora_training_client("base", rank=1, seed=1).result()
    model_id = run.get_info().model_id
    empty = sdk.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn="cross_entropy")
    answer = result(service, post(service, "forward_backward", empty.SerializeToString()))
    assert answer.metrics["loss:sum"] == 0
    none = types.Datum(
        model_input=types.ModelInput(chunks=[]),
        loss_fn_inputs={"target_tokens": tensor([], "int64")},
    )
    other = client.create_lora_training_client("base", rank=1, seed=1).result()
    with pytest.raises(tinker.RequestFailedError, match="datum 1: 0 tokens"):
        other.forward_backward([datum(ROW), none], "cross_entropy").result(timeout=30)
    with pytest.raises(tinker.RequestFailedError, match="no gradients"):
        other.optim_step(types.AdamParams()).result(timeout=30)  # the first row adds none either


def test_rows_whose_weights_are_all_zero_change_nothing(run: Any):
    before = run.forward([datum(ROW)], "cross_entropy").result()
    found = run.forward_backward([datum(ROW, weights=[0.0] * 4)], "cross_entropy").result()
    assert found.metrics["loss:sum"] == 0
    fresh = types.AdamParams(learning_rate=1e-2, beta1=0.0)  # no momentum of the step before
    run.optim_step(fresh).result()
    after = run.forward([datum(ROW)], "cross_entropy").result()
    assert logprobs(after)[0].tolist() == pytest.approx(logprobs(before)[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
def test_a_forward_pass_has_the_loss_that_it_was_asked_for(run: Any, loss: str):
    given = (
        {} if loss == "cross_entropy" else {"logprobs": [-2.0] * 4, "advantages": [1.0, -1, 2, 0]}
    )
    rows = [datum(ROW, **given)]
    alone = run.forward(rows, loss).result().metrics["loss:sum"]
    assert alone == pytest.approx(run.forward_backward(rows, loss).result().metrics["loss:sum"])
    assert abs(alone) > 0.1


def test_pictures_are_refused_in_words_in_prompts_and_in_rows(client: Any, run: Any):
    sampler = client.create_sampling_client(base_model="base").result()
    shown = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=ROW), PNG])
    params = types.SamplingParams(max_tokens=2)
    with pytest.raises(tinker.RequestFailedError, match="'image' is not taken: prompts are text"):
        sampler.sample(shown, 1, params).result(timeout=30)
    row = types.Datum(
        model_input=shown, loss_fn_inputs={"target_tokens": tensor([*ROW, 1, 2], "int64")}
    )
    with pytest.raises(tinker.RequestFailedError, match="has a chunk that is not text"):
        run.forward_backward([row], "cross_entropy").result(timeout=30)
    assert run.forward([datum(ROW)], "cross_entropy").result().metrics


@pytest.mark.parametrize(
    "asked",
    [
        {"num_samples": 0},
        {"num_samples": 10**6},
        {"prompt": {"chunks": []}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [10**9]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5] * 5000}]}},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"max_tokens": 0}},
        {"sampling_params": {"top_p": 0}},
        {"sampling_params": {"stop": {"a": 1}}},
        {"target_prompt_logprobs": True},
        {"topk_prompt_logprobs": 10**9},
    ],
)
def test_a_sample_that_cannot_be_drawn_fails_in_words_at_once(service: Running, asked: Any):
    chunks = [{"type": "encoded_text", "tokens": ROW}]
    body = {"base_model": "base", "prompt": {"chunks": chunks}, "sampling_params": {}} | asked
    failed = result(service, post(service, "asample", body))
    assert failed["category"] == "user"
    assert failed["error"]
    assert "\n" not in failed["error"]


def test_a_session_that_nobody_has_is_gone_and_a_model_that_is_asked_for_twice_is_one(
    service: Running,
):
    gone = post(service, "session_heartbeat", {"session_id": "nobody"})
    assert gone.status_code == 410  # which ends the client's heartbeats
    session = post(service, "create_session", {}).json()["session_id"]
    other = post(service, "create_session", {}).json()["session_id"]
    assert session != other
    body = {"session_id": session, "model_seq_id": 3, "base_model": "base"}
    begun = [post(service, "create_model", body | {"lora_config": {"rank": 1}}) for _ in range(2)]
    ids = {result(service, one)["model_id"] for one in begun}
    assert ids == {f"{session}:train:3"}


def test_flags_say_what_is_trained_and_a_tied_embedding_stays_as_it_is(tied: Path):
    with Engine(str(tied), dtype="float32") as engine:
        parts, ids = LoraParts(engine.resident.base), [5, 9, 13, 60, 61]
        embedding = engine.resident.base.get_input_embeddings().weight
        before = embedding.clone()
        names = {"attn": "self_attn", "mlp": "mlp", "unembed": "lm_head"}
        for part, name in names.items():
            lora = Lora(rank=3, **{f"train_{other}": other == part for other in names})
            engine.create_adapter(part, parts.config(lora), seed=7)
            trained = engine.resident.trained(part)
            assert trained
            assert all(name in key for key in trained), part
            assert sum(t.numel() for t in trained.values()) == parts.parameters(lora)
            for _ in range(2):
                engine.forward_backward([engine.row(part, ids[:1], ids[1:])])
                engine.optim_step(part, 1e-2)
        assert torch.equal(embedding, before)
        [said] = engine.sample([ids], "unembed", max_new_tokens=4)
        found = engine.forward([engine.row("unembed", ids, said.tokens)]).logprobs[0]
        assert found.tolist() == pytest.approx(said.logprobs, abs=1e-4)
