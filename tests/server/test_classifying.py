"""`POST /classify`: a classifier's adapter beside adapters that write, on one causal base."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from command import run_lorakit
from lorakit.adapters.open import open_adapter
from lorakit.server.options import ServerOptions
from served import Running, refused, running
from small_runs import recipe
from tiny import save_tiny_encoder

LABELS = ["bad", "good", "so so"]
TEXTS = ["hello", "größe and more", "x"]


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    rows = folder / "rows.jsonl"
    written = [{"text": f"row {n}" * (1 + n % 3), "label": LABELS[n % 3]} for n in range(24)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    values = recipe(base, rows, folder / "run", max_steps=3)
    values["lora"]["task_type"] = "SEQ_CLS"
    return Path(lorakit.train(values, quiet=True).output_dir)


@pytest.fixture(scope="module")
def server(base: Path, root: Path, classifier: Path) -> Iterator[Running]:
    adapters = {"shop": root / "shop", "mood": classifier}
    with running(base, adapters, ServerOptions(port=0), max_rows=4) as found:
        yield found


def test_texts_and_tokens_get_the_labels_of_the_trained_model(
    server: Running, classifier: Path
) -> None:
    opened = open_adapter(classifier, dtype="float32")
    for path in ("/classify", "/v1/classify"):
        reply = server.post(path, {"model": "mood", "input": TEXTS}).json()
        assert reply["object"] == "list"
        for text, found in zip(TEXTS, reply["data"], strict=True):
            ids = opened.tokenizer(text)["input_ids"]
            with torch.no_grad():
                expected = opened.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
            assert found["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
            assert found["label"] == LABELS[int(expected.argmax())]
            assert found["num_classes"] == 3
    ids = server.engine.tokenizer(TEXTS[0])["input_ids"]
    [by_ids] = server.post("/classify", {"model": "mood", "input": ids}).json()["data"]
    [by_text] = server.post("/classify", {"model": "mood", "input": TEXTS[0]}).json()["data"]
    assert by_ids == by_text


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/classify", {"model": "shop", "input": "a"}, "labels"),
    ("/pooling", {"model": "mood", "input": "a"}, "/classify"),
    ("/v1/score", {"model": "mood", "text_1": "a", "text_2": "b"}, "/classify"),
    ("/v1/completions", {"model": "mood", "prompt": "a"}, "/classify"),
]


@pytest.mark.parametrize(("path", "body", "told"), REFUSED)
def test_each_model_is_asked_for_what_it_gives(
    server: Running, path: str, body: dict[str, Any], told: str
) -> None:
    error = refused(server.post(path, body), 400)
    assert error["param"] == "model"
    assert told in error["message"]
    assert server.complete().status_code == 200


def test_an_encoder_is_not_trained_by_the_service_and_is_told_its_use(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    done = run_lorakit(tmp_path, "serve", "--model", folder, "--training")
    assert done.returncode == 2
    assert "is an encoder (bert)" in done.stderr
    assert "SEQ_CLS" in done.stderr
    assert "Traceback" not in done.stderr
