"""`POST /pooling`: a reward model beside adapters that write, as vLLM has it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.adapters.open import OpenAdapter, open_adapter
from lorakit.data.masking import tokenize
from lorakit.data.samples import Sample
from lorakit.server.options import ServerOptions
from served import Running, refused, running
from small_runs import recipe

PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know" + "." * n}
    for n in range(12)
]
TALK = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]


@pytest.fixture(scope="module")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    rows = folder / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    values = recipe(base, rows, folder / "run", max_steps=5) | {"objective": "reward"}
    return lorakit.train(values, quiet=True).output_dir


@pytest.fixture(scope="module")
def server(base: Path, root: Path, reward: Path) -> Iterator[Running]:
    adapters = {"shop": root / "shop", "reward": reward}
    with running(base, adapters, ServerOptions(port=0), max_rows=4) as found:
        yield found


@pytest.fixture(scope="module")
def opened(reward: Path) -> OpenAdapter:
    return open_adapter(reward, dtype="float32")


def own_score(opened: OpenAdapter, sample: Sample) -> float:
    ids = tokenize(sample, opened.tokenizer, 4096).input_ids
    with torch.no_grad():
        return float(opened.model(input_ids=torch.tensor([ids])).logits)


def scores(server: Running, **body: Any) -> list[float]:
    found = server.post("/pooling", {"model": "reward", **body})
    assert found.status_code == 200, found.text
    reply = found.json()
    assert reply["object"] == "list"
    assert reply["usage"]["completion_tokens"] == 0
    assert [one["index"] for one in reply["data"]] == list(range(len(reply["data"])))
    return [one["data"][0] for one in reply["data"]]


def test_a_conversation_texts_and_tokens_have_the_scores_of_the_trained_model(
    server: Running, opened: OpenAdapter
):
    [found] = scores(server, messages=TALK)
    wanted = own_score(opened, Sample(tuple(TALK), None, "talk"))
    assert found == pytest.approx(wanted, rel=1e-3)
    texts = ["It is 2.", "I do not know."]
    wanted_of = [own_score(opened, Sample((), text, "text")) for text in texts]
    assert scores(server, input=texts) == pytest.approx(wanted_of, rel=1e-3)
    ids = tokenize(Sample((), texts[0], "text"), opened.tokenizer, 4096).input_ids
    assert scores(server, input=ids) == pytest.approx(wanted_of[:1], rel=1e-3)


def test_scores_are_the_same_while_others_write(server: Running):
    [alone] = scores(server, messages=TALK)
    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(server.complete, max_tokens=40) for _ in range(3)]
        scoring = [pool.submit(scores, server, messages=TALK) for _ in range(5)]
        assert all(one.result() == pytest.approx([alone], rel=1e-5) for one in scoring)
        assert all(one.result().status_code == 200 for one in writing)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "shop", "input": "a"}, "model"),
        ({"model": "reward"}, None),
        ({"model": "reward", "input": "a", "messages": TALK}, None),
        ({"model": "reward", "messages": TALK[:1]}, None),
        ({"model": "reward", "input": ""}, "input"),
        ({"model": "reward", "input": "a" * 5000}, "input"),
        ({"model": "reward", "input": [999999]}, "input"),
        ({"model": "reward", "input": "a", "encoding_format": "base64"}, "encoding_format"),
    ],
)
def test_what_cannot_be_scored_is_refused(server: Running, body: Any, field: str | None):
    error = refused(server.post("/pooling", body), 400)
    if field is not None:
        assert error["param"] == field


def test_a_reward_model_writes_nothing(server: Running):
    asked = {"model": "reward", "messages": TALK[:1]}
    error = refused(server.post("/v1/chat/completions", asked), 400)
    assert "/pooling" in error["message"]
    refused(server.complete(model="reward"), 400)
    assert refused(server.post("/pooling", {"model": "nobody", "input": "a"}), 404)
