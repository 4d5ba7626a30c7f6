"""Encoders' classifiers and cross-encoders behind the API, beside transformers and PEFT.

They are adapters, and checkpoints that are classifiers themselves.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError
from transformers import AutoModel, AutoModelForMaskedLM

import lorakit
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.models.bundled import ENCODER, encoder
from lorakit.server.options import ServerOptions
from served import Running, refused, running
from small_runs import recipe
from tiny import letter_tokenizer, make_attentive, save_tiny_encoder
from tiny_classifiers import (
    classifier_adapter,
    classifier_tokenizer,
    logits_of,
    save_classifier,
    small_config,
)

TEXTS = ["a cat, 1", "the quick brown fox.", "b"]
QUERY, DOCUMENTS = "which cat", ["a cat, 1", "the quick brown fox.", "b", "cats and 2 dogs"]
LABELS = {"mood": 3, "rank": 1, "topic": 5}


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "base")
    model = AutoModel.from_pretrained(folder)
    make_attentive(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(encoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {
        "mood": {"modules_to_save": ["classifier", "bert.pooler"]},
        "rank": {"use_dora": True},
        "topic": {"target": ("query", "key", "pooler.dense", "intermediate.dense")},
    }
    return {
        name: classifier_adapter(encoder_base, root / name, LABELS[name], seed, **fields)
        for seed, (name, fields) in enumerate(made.items(), 1)
    }


@pytest.fixture(scope="module")
def server(encoder_base: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    with running(encoder_base, adapters, ServerOptions(port=0), max_rows=8) as found:
        yield found


def asked(server: Running, path: str, **body: Any) -> Any:
    found = server.post(path, body)
    assert found.status_code == 200, found.text
    return found.json()


def test_rows_of_several_classifiers_have_the_probabilities_of_transformers_and_peft(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    def made(name: str) -> Any:
        path = "/classify" if name == "mood" else "/v1/classify"
        return asked(server, path, model=name, input=TEXTS)

    with ThreadPoolExecutor(len(adapters)) as threads:  # in one batch, as they wait together
        for name, reply in zip(adapters, threads.map(made, adapters), strict=True):
            assert reply["object"] == "list"
            assert reply["usage"]["prompt_tokens"] > 0
            for one, text in zip(reply["data"], TEXTS, strict=True):
                of = {"adapter": adapters[name], "labels": LABELS[name]}
                logits = logits_of(encoder_base, text, **of)
                expected = logits.softmax(-1) if LABELS[name] > 1 else logits.sigmoid()
                assert one["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
                assert one["label"] == f"LABEL_{int(expected.argmax())}"
                assert one["num_classes"] == LABELS[name]
    ids = server.engine.tokenizer(TEXTS[0])["input_ids"]
    by_ids = asked(server, "/classify", model="mood", input=[ids, ids])["data"]
    [by_text] = asked(server, "/classify", model="mood", input=TEXTS[0])["data"]
    assert by_ids[1]["probs"] == pytest.approx(by_text["probs"], abs=1e-6)
    raw = asked(server, "/classify", model="mood", input=TEXTS[0], use_activation=False)["data"]
    expected = logits_of(encoder_base, TEXTS[0], adapter=adapters["mood"], labels=3)
    assert raw[0]["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_one_pass_of_the_body_serves_all_heads_and_embeddings(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    asked(server, "/classify", model="mood", input=TEXTS)  # whether rows may be padded is known
    engine, waiting, passes = server.engine, [], []
    names = [None, "mood", "rank", "topic", "mood"]
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[0], TEXTS[0]]
    for name, text in zip(names, texts, strict=True):
        ids = tuple(engine.tokenizer(text)["input_ids"])
        waiting.append((Ticket(ids, name, Sampling(embeds=name is None)), *engine.found(name)))
    body = engine.resident.base
    hook = body.encoder.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        engine.training.call(None, lambda: engine._answers.pooler.answer(waiting)).result()
    hook.remove()
    assert passes == [1]
    for (ticket, *_), name, text in zip(waiting, names, texts, strict=True):
        [piece] = ticket
        if name is None:
            assert piece.embedding is not None
            continue
        expected = logits_of(encoder_base, text, adapter=adapters[name], labels=LABELS[name])
        assert piece.scores == pytest.approx(expected.tolist(), abs=1e-5)


def pair_scores(
    base: Path, adapter: Path, documents: list[str], side: str = "right", **how: Any
) -> list[float]:
    of: dict[str, Any] = {"adapter": adapter, "labels": 1, "side": side, **how}
    return [float(logits_of(base, QUERY, document, **of).sigmoid()) for document in documents]


def test_a_query_and_a_document_are_one_pair_of_the_tokenizer(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    expected = pair_scores(encoder_base, adapters["rank"], DOCUMENTS)
    assert max(expected) - min(expected) > 1e-3
    for one, other in (
        ("text_1", "text_2"),
        ("data_1", "data_2"),
        ("queries", "documents"),
        ("queries", "items"),
    ):
        for path in ("/score", "/v1/score"):
            reply = asked(server, path, model="rank", **{one: QUERY, other: DOCUMENTS})
            assert [x["score"] for x in reply["data"]] == pytest.approx(expected, abs=1e-5)
            assert {x["object"] for x in reply["data"]} == {"score"}
    order = sorted(range(4), key=lambda i: -expected[i])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {"model": "rank", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
        found = asked(server, path, **body)
        assert [x["index"] for x in found["results"]] == order[:3]
        assert [x["document"]["text"] for x in found["results"]] == [
            DOCUMENTS[i] for i in order[:3]
        ]
        scores = [x["relevance_score"] for x in found["results"]]
        assert scores == pytest.approx([expected[i] for i in order[:3]], abs=1e-5)
        tokenizer = server.engine.tokenizer
        tokens = sum(len(tokenizer(QUERY, d)["input_ids"]) for d in DOCUMENTS)
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == tokens
    raw = asked(server, "/score", model="rank", text_1=QUERY, text_2="b", use_activation=False)
    [one] = raw["data"]
    assert 1 / (1 + math.exp(-one["score"])) == pytest.approx(expected[2], abs=1e-5)
    pooled = asked(server, "/pooling", model="rank", input="b")["data"][0]["data"]
    alone = logits_of(encoder_base, "b", adapter=adapters["rank"], labels=1).sigmoid()
    assert pooled == pytest.approx(alone.tolist(), abs=1e-5)


def test_pairs_are_classified(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    pairs = [[QUERY, DOCUMENTS[0]], [QUERY, DOCUMENTS[1]]]
    found = asked(server, "/classify", model="topic", input=pairs)["data"]
    for one, pair in zip(found, pairs, strict=True):
        expected = logits_of(encoder_base, *pair, adapter=adapters["topic"], labels=5).softmax(-1)
        assert one["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_long_pairs_are_refused_or_cut_as_the_tokenizer_cuts_them(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    long = ["the end of " * 9, "b"]
    body = {"model": "rank", "query": QUERY, "documents": long}
    error = refused(server.post("/v1/rerank", body), 400)
    assert error["code"] == "context_length_exceeded"

    def scores(**fields: Any) -> list[float]:
        found = asked(server, "/v1/rerank", **body, **fields)["results"]
        return [x["relevance_score"] for x in sorted(found, key=lambda x: x["index"])]

    rank = adapters["rank"]
    for most, length in ((20, 20), (-1, 64)):
        cut = {"truncation": "longest_first", "max_length": length}
        expected = pair_scores(encoder_base, rank, long, **cut)
        assert scores(truncate_prompt_tokens=most) == pytest.approx(expected, abs=1e-5)
    expected = pair_scores(encoder_base, rank, long, "left", truncation=True, max_length=20)
    left = scores(truncate_prompt_tokens=20, truncation_side="left")
    assert left == pytest.approx(expected, abs=1e-5)
    query, special = len(letter_tokenizer().tokenize(QUERY)), 3
    only = {"truncation": "only_second", "max_length": query + special + 6}
    expected = pair_scores(encoder_base, rank, long[:1], **only)
    assert scores(max_tokens_per_doc=6)[0] == pytest.approx(expected[0], abs=1e-5)
    expected = pair_scores(encoder_base, rank, long[:1], truncation=True, max_length=6 + 6 + 3)
    each = {"max_tokens_per_doc": 9, "max_tokens_per_query": 7}
    found = scores(**each, truncate_prompt_tokens=15)[0]
    assert found == pytest.approx(expected[0], abs=1e-5)
    for wrong in ({"truncate_prompt_tokens": 3}, {"truncation_side": "up"}, {"truncate": True}):
        refused(server.post("/v1/rerank", body | wrong), 400)


def test_each_model_says_what_it_gives(server: Running) -> None:
    talk: Any = [{"role": "user", "content": "hello"}]
    for name, where in (("mood", "/classify"), ("rank", "/v1/rerank"), (None, "/v1/embeddings")):
        model = name or server.engine.model_name
        with pytest.raises(BadRequestError, match=where):
            server.openai.chat.completions.create(model=model, messages=talk)
        refused(server.post("/v1/completions", {"model": model, "prompt": "a"}), 400)
        refused(server.post("/v1/responses", {"model": model, "input": "a"}), 400)
    score = {"model": "mood", "text_1": "a", "text_2": "b"}
    assert "/classify" in refused(server.post("/v1/score", score), 400)["message"]
    base = {"model": server.engine.model_name, "input": "a"}
    assert "labels" in refused(server.post("/classify", base), 400)["message"]
    assert (
        "messages"
        in refused(
            server.post(
                "/pooling",
                {"model": "rank", "messages": [*talk, {"role": "assistant", "content": "b"}]},
            ),
            400,
        )["message"]
    )
    one = {"model": "rank", "text_1": "a"}
    assert "text_2" in refused(server.post("/v1/score", one), 400)["message"]
    assert (
        "queries" in refused(server.post("/v1/score", one | {"documents": ["b"]}), 400)["message"]
    )


CHECKPOINTS: list[tuple[str, int, dict[str, Any], str]] = [
    (
        "bert",
        1,
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        "raw",
    ),
    ("bert", 1, {"problem_type": "regression"}, "raw"),
    ("bert", 4, {"problem_type": "multi_label_classification"}, "sigmoid"),
    ("roberta", 1, {}, "sigmoid"),
    ("modernbert", 3, {"classifier_pooling": "mean"}, "softmax"),
    ("distilbert", 2, {}, "softmax"),
    ("deberta-v2", 2, {}, "softmax"),
    ("xlnet", 2, {}, "softmax"),
    ("fnet", 2, {}, "softmax"),  # these two read padding too
    ("convbert", 2, {}, "softmax"),
    ("llama", 2, {}, "softmax"),
    ("llama", 1, {"pad_token_id": None}, "sigmoid"),  # its tokenizer's is the end token
    ("llama", 2, {"pad_token_id": 3}, "softmax"),  # which ends every text
]


MORE = (
    *("albert", "camembert", "deberta", "electra", "eurobert", "gemma2", "gpt2", "mpnet", "opt"),
    *("qwen3", "rembert", "roformer", "squeezebert", "xlm-roberta"),
)


@pytest.mark.parametrize(
    ("kind", "labels", "fields", "how"),
    [
        *CHECKPOINTS,
        *(pytest.param(kind, 2, {}, "softmax", marks=pytest.mark.exhaustive) for kind in MORE),
    ],
)
def test_a_checkpoint_that_is_a_classifier_is_served_with_transformers_numbers(
    tmp_path: Path, kind: str, labels: int, fields: dict[str, Any], how: str
) -> None:
    names = {i: f"label {i}" for i in range(labels)}
    folder = save_classifier(tmp_path / kind, kind, id2label=names, **fields)

    def expected(*texts: str) -> list[float]:
        logits = logits_of(folder, *texts)
        one = {"raw": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1)}[how]
        return list(one.tolist())

    with running(folder, {}, ServerOptions(port=0), max_rows=8) as server:
        model = str(folder)
        texts: list[Any] = [*TEXTS, [QUERY, DOCUMENTS[3]], [QUERY, "b"]]
        found = asked(server, "/classify", model=model, input=texts)["data"]
        for one, text in zip(found, texts, strict=True):
            wanted = expected(text) if isinstance(text, str) else expected(*text)
            assert one["probs"] == pytest.approx(wanted, abs=1e-5)
            assert one["label"] == names[max(range(labels), key=wanted.__getitem__)]
        score = {"model": model, "text_1": QUERY, "text_2": DOCUMENTS}
        if labels == 1:
            data = asked(server, "/v1/score", **score)["data"]
            wanted = [expected(QUERY, document)[0] for document in DOCUMENTS]
            assert [one["score"] for one in data] == pytest.approx(wanted, abs=1e-5)
        else:
            refused(server.post("/v1/score", score), 400)
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            error = refused(server.post(path, {"model": model, **body}), 400)
            assert ("/v1/rerank" if labels == 1 else "/classify") in error["message"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("roberta", ("query", "dense")),
        ("modernbert", ("Wqkv", "Wo")),
        ("distilbert", ("q_lin", "lin2")),
        ("llama", ("q_proj", "down_proj")),
    ],
)
def test_adapters_stand_on_classifiers_and_bring_heads_of_their_own(
    tmp_path: Path, kind: str, target: tuple[str, ...]
) -> None:
    base = save_classifier(tmp_path / "base", kind, num_labels=2)
    folders = {
        name: classifier_adapter(base, tmp_path / name, labels, labels, target)
        for name, labels in (("two", 2), ("one", 1))
    }
    with running(base, folders, ServerOptions(port=0), max_rows=4) as server:
        for name, labels in (("two", 2), ("one", 1)):
            found = asked(server, "/classify", model=name, input=TEXTS)["data"]
            for one, text in zip(found, TEXTS, strict=True):
                logits = logits_of(base, text, adapter=folders[name], labels=labels)
                wanted = logits.softmax(-1) if labels > 1 else logits.sigmoid()
                assert one["probs"] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "target"),
    [("modernbert", ("Wqkv",)), ("roberta", ("query",)), ("distilbert", ("q_lin",))],
)
def test_a_head_has_what_the_files_of_a_masked_language_model_hold_of_it(
    tmp_path: Path, kind: str, target: tuple[str, ...]
) -> None:
    """As ModernBERT's `head`, which PEFT does not save."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(small_config(kind))
    make_attentive(model)
    model.save_pretrained(base := tmp_path / "base")
    classifier_tokenizer(kind).save_pretrained(base)
    adapter = classifier_adapter(base, tmp_path / "adapter", 3, 1, target)
    with running(base, {"mood": adapter}, ServerOptions(port=0), max_rows=4) as server:
        found = asked(server, "/classify", model="mood", input=TEXTS)["data"]
        for one, text in zip(found, TEXTS, strict=True):
            expected = logits_of(base, text, adapter=adapter, labels=3).softmax(-1)
            assert one["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_what_a_head_lacks_is_told(tmp_path: Path) -> None:
    """PEFT saves ModernBERT's `classifier`, and leaves the `head` before it random."""
    base = tmp_path / "base"
    AutoModel.from_config(small_config("modernbert")).save_pretrained(base)
    letter_tokenizer().save_pretrained(base)
    made = classifier_adapter(base, tmp_path / "made", 2, 1, ("Wqkv",))
    with pytest.raises(InputError, match=r"head\.dense.*modules_to_save"):
        open_engine(str(base), {"made": made}, embeds=True)
    bare = save_tiny_encoder(tmp_path / "bare", pooler=False)
    adapter = classifier_adapter(bare, tmp_path / "adapter", 2, 1)
    with pytest.raises(InputError, match=r"bert\.pooler\.dense"):
        open_engine(str(bare), {"adapter": adapter}, embeds=True)
    one = save_classifier(
        tmp_path / "one",
        "bert",
        num_labels=1,
        sentence_transformers={"activation_fn": "torch.nn.modules.activation.GELU"},
    )
    long = save_classifier(tmp_path / "long", "longformer", num_labels=2)
    with pytest.raises(InputError, match="global_attention_mask"):
        open_engine(str(long), {}, embeds=True)
    with pytest.raises(InputError, match="GELU"):
        open_engine(str(one), {}, embeds=True)


def test_what_lorakit_trains_on_an_encoder_is_served_with_its_labels(
    encoder_base: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    names = ["entails", "contradicts", "so so"]
    written = [
        {"text": f"row {n}" * (1 + n % 3), "text_pair": "b", "label": names[n % 3]}
        for n in range(24)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    values = recipe(encoder_base, rows, tmp_path / "run", max_steps=3)
    values["lora"]["task_type"] = "SEQ_CLS"
    folder = Path(lorakit.train(values, quiet=True).output_dir)
    opened = open_adapter(folder, dtype="float32")
    with running(encoder_base, {"nli": folder}, ServerOptions(port=0), max_rows=4) as server:
        assert not server.engine.pool.version("nli").info.notice
        pairs = [["row 1", "b"], ["x", "c and d"]]
        found = asked(server, "/classify", model="nli", input=pairs)["data"]
        for one, pair in zip(found, pairs, strict=True):
            given = opened.tokenizer(*pair, return_tensors="pt")
            with torch.no_grad():
                expected = opened.model(**given).logits[0].softmax(-1)
            assert one["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
            assert one["label"] == opened.labels[int(expected.argmax())]


def test_classifiers_that_are_trained_on_a_quantised_encoder_are_served_on_one(
    encoder_base: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    written = [{"text": f"row {n}", "label": f"{n % 2}"} for n in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    values = recipe(encoder_base, rows, tmp_path / "run", max_steps=2)
    values["lora"]["task_type"], values["quantization"] = "SEQ_CLS", "nf4"
    folder = Path(lorakit.train(values, quiet=True).output_dir)
    opened = open_adapter(folder, dtype="float32")
    with running(encoder_base, {"two": folder}, ServerOptions(port=0), max_rows=4) as server:
        kinds = {type(module).__name__ for module in server.engine.resident.base.modules()}
        assert "Linear4bit" in kinds
        assert not server.engine.pool.version("two").info.notice
        found = asked(server, "/classify", model="two", input=TEXTS)["data"]
        for one, text in zip(found, TEXTS, strict=True):
            with torch.no_grad():
                logits = opened.model(**opened.tokenizer(text, return_tensors="pt")).logits[0]
            assert one["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_the_real_encoder_classifies_with_adapters(tmp_path: Path) -> None:
    made = {
        "rank": classifier_adapter(encoder(), tmp_path / "rank", 1, 1),
        "mood": classifier_adapter(encoder(), tmp_path / "mood", 3, 2),
    }
    documents = ["A man is eating food.", "Someone eats a meal.", "The stock market fell, sharply."]
    query = "Who eats?"
    with running(Path(ENCODER), made, ServerOptions(port=0), max_rows=4) as server:
        data = asked(server, "/v1/score", model="rank", text_1=query, text_2=documents)["data"]
        for one, document in zip(data, documents, strict=True):
            logits = logits_of(encoder(), query, document, adapter=made["rank"], labels=1)
            assert one["score"] == pytest.approx(float(logits.sigmoid()), abs=1e-5)
        [mood] = asked(server, "/classify", model="mood", input=documents[0])["data"]
        logits = logits_of(encoder(), documents[0], adapter=made["mood"], labels=3)
        assert mood["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        ranked = server.openai.embeddings.create(model=ENCODER, input=documents)
        assert len(ranked.data) == 3
