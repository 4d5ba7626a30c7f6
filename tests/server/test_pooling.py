"""`POST /pooling`: a reward model beside adapters that write, as vLLM has it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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


def test_pairs_are_scored_and_documents_sorted(server: Running) -> None:
    asked, answers = "1 + 1?", ["It is 2.", "I do not know.", "2"]
    expected = []
    for text in answers:
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        expected += scores(server, messages=talk)
    given = {"model": "reward", "text_1": asked, "text_2": answers}
    found = server.post("/v1/score", given).json()
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)
    ranked = server.post(
        "/v1/rerank", {"model": "reward", "query": asked, "documents": answers, "top_n": 2}
    ).json()["results"]
    order = sorted(range(3), key=lambda i: -expected[i])[:2]
    assert [one["index"] for one in ranked] == order
    assert [one["document"]["text"] for one in ranked] == [answers[i] for i in order]
    wrong = {"model": "reward", "text_1": ["a", "b"], "text_2": ["c", "d", "e"]}
    assert "text_1" in refused(server.post("/v1/score", wrong), 400)["message"]
    refused(server.post("/v1/score", {"model": "shop", "text_1": "a", "text_2": "b"}), 400)


def test_embeddings_are_those_of_the_adapter(server: Running, base: Path, root: Path) -> None:
    texts = ["hello", "größe and more"]
    for name, folder in (("shop", root / "shop"), (server.engine.model_name, None)):
        made = server.openai.embeddings.create(model=name, input=texts)
        if folder is None:
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        else:
            model = open_adapter(folder, dtype="float32").model
        for one, text in zip(made.data, texts, strict=True):
            ids = torch.tensor([server.engine.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                h = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            expected = (h / h.norm()).tolist()
            assert one.embedding == pytest.approx(expected, abs=1e-5)
    few = server.openai.embeddings.create(
        model="shop", input="hello", dimensions=5, encoding_format="float"
    )
    assert sum(value**2 for value in few.data[0].embedding) == pytest.approx(1)
    assert len(few.data[0].embedding) == 5
    assert few.usage.prompt_tokens == 5
    refused(server.post("/v1/embeddings", {"model": "shop", "input": "a", "dimensions": 9999}), 400)
