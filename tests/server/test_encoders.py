"""Embedding models behind the API: encoders and their adapters, beside transformers and PEFT."""

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from openai import BadRequestError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaModel

from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.models.bundled import ENCODER, encoder
from lorakit.models.sentence_pooling import read_pooling
from lorakit.server.options import ServerOptions
from served import Running, refused, running
from tiny import make_attentive, save_tiny_encoder

TEXTS = ["a cat, 1", "the quick brown fox.", "b"]


def describe(folder: Path, *modes: str, normalize: bool = True, dense: bool = False) -> None:
    """Writes what sentence-transformers writes beside a model."""
    kinds = ["Transformer", "Pooling", *["Dense"] * dense, *["Normalize"] * normalize]
    places = ["", *(f"{at}_{kind}" for at, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": at, "name": str(at), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for at, (place, kind) in enumerate(zip(places, kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for place in places[1:]:
        (folder / place).mkdir(exist_ok=True)
    settings = {f"pooling_mode_{mode}": True for mode in modes} | {"pooling_mode_x": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if dense:
        width = 32 * len(modes)
        torch.manual_seed(3)
        layer = {"linear.weight": torch.randn(8, width) / 5, "linear.bias": torch.randn(8)}
        save_file(layer, folder / "2_Dense" / "model.safetensors")
        own = {"in_features": width, "out_features": 8, "activation_function": "torch.nn.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(own))


def embed_adapter(base: Path, folder: Path, seed: int, **fields: Any) -> Path:
    """A random adapter of PEFT's own for FEATURE_EXTRACTION."""
    torch.manual_seed(seed)
    given = {"r": 4, "target_modules": ["query", "value", "dense"], **fields}
    config = peft.LoraConfig(**given, task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    peft.get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "base")
    model = AutoModel.from_pretrained(folder)
    make_attentive(model)
    model.save_pretrained(folder)
    describe(folder, "mean_tokens")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    return folder


@pytest.fixture(scope="module")
def adapters(encoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "news": embed_adapter(encoder_base, root / "news", 1),
        "mail": embed_adapter(encoder_base, root / "mail", 2, use_dora=True),
    }


@pytest.fixture(scope="module")
def server(encoder_base: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    with running(encoder_base, adapters, ServerOptions(port=0), max_rows=8) as found:
        yield found


def by_hand(base: Path, adapter: Path | None, text: str) -> list[float]:
    """The mean of transformers' last hidden states, of length 1; of one text alone."""
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    asked = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")
    with torch.no_grad():
        h = model.eval()(**asked).last_hidden_state[0].mean(0)
    return list((h / h.norm()).tolist())


def test_rows_of_several_adapters_have_the_vectors_of_transformers_and_peft(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    folders = {server.engine.model_name: None, **adapters}

    def made(name: str) -> list[list[float]]:
        found = server.openai.embeddings.create(model=name, input=TEXTS)
        assert found.usage.prompt_tokens == found.usage.total_tokens > 0
        return [one.embedding for one in found.data]

    with ThreadPoolExecutor(len(folders)) as threads:  # in one batch, as they wait together
        for name, vectors in zip(folders, threads.map(made, folders), strict=True):
            for vector, text in zip(vectors, TEXTS, strict=True):
                expected = by_hand(encoder_base, folders[name], text)
                assert vector == pytest.approx(expected, abs=1e-5)


def test_one_pass_computes_rows_of_different_adapters(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    """The routing gives each row its own, beside padding."""
    engine, asked = server.engine, []
    for name, text in zip((None, "news", "mail"), TEXTS, strict=True):
        version, loaded = engine.found(name)
        engine.training.call(None, lambda v=version, x=loaded: engine._answers.bring(v, x)).result()  # type: ignore[misc]
        asked.append((engine.tokenizer(text)["input_ids"], version.key if version else "__base__"))
    work = lambda: engine._answers.pooler.embeddings(*zip(*asked, strict=True))  # noqa: E731
    with torch.no_grad():
        found = engine.training.call(None, work).result()
    for vector, name, text in zip(found, (None, "news", "mail"), TEXTS, strict=True):
        expected = by_hand(encoder_base, adapters.get(name or ""), text)
        assert vector.tolist() == pytest.approx(expected, abs=1e-5)


def test_texts_are_scored_and_sorted_by_the_cosine_of_their_vectors(
    server: Running, encoder_base: Path, adapters: dict[str, Path]
) -> None:
    first = by_hand(encoder_base, adapters["news"], TEXTS[0])
    others = [by_hand(encoder_base, adapters["news"], text) for text in TEXTS[1:]]
    expected = [sum(a * b for a, b in zip(first, other, strict=True)) for other in others]
    asked = {"model": "news", "text_1": TEXTS[0], "text_2": TEXTS[1:]}
    found = server.post("/v1/score", asked).json()
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)
    ranked = server.post(
        "/v1/rerank", {"model": "news", "query": TEXTS[0], "documents": TEXTS, "top_n": 2}
    ).json()["results"]
    assert ranked[0]["index"] == 0
    assert ranked[0]["relevance_score"] == pytest.approx(1)
    assert len(ranked) == 2
    pooled = server.post("/pooling", {"model": "news", "input": TEXTS[0]}).json()["data"]
    assert pooled[0]["data"] == pytest.approx(first, abs=1e-5)


def test_an_encoder_writes_nothing_and_says_what_it_does(server: Running) -> None:
    talk = [{"role": "user", "content": "hello"}]
    with pytest.raises(BadRequestError, match="/v1/embeddings"):
        server.openai.chat.completions.create(model="news", messages=talk)  # type: ignore[arg-type]
    for body in (
        ("/v1/completions", {"model": server.engine.model_name, "prompt": "a"}),
        ("/v1/completions", {"model": "news", "prompt": "a", "prompt_logprobs": 1}),
        ("/v1/completions", {"model": "news", "prompt": "a", "max_tokens": 0, "echo": True}),
        ("/v1/responses", {"model": "mail", "input": "a"}),
        ("/classify", {"model": "mail", "input": "a"}),
        ("/pooling", {"model": "mail", "messages": [*talk, {"role": "assistant", "content": "b"}]}),
    ):
        refused(server.post(*body), 400)


def test_long_texts_are_refused_or_cut_between_their_special_tokens(server: Running) -> None:
    tokenizer, long = server.engine.tokenizer, "a" * 60
    error = refused(server.post("/v1/embeddings", {"model": "news", "input": long}), 400)
    assert error["code"] == "context_length_exceeded"

    def made(**fields: Any) -> Any:
        found = server.post("/v1/embeddings", {"model": "news", **fields})
        assert found.status_code == 200, found.text
        return found.json()

    whole = made(input="a" * 38)  # 40 tokens, as max_seq_length has it
    assert whole["usage"]["prompt_tokens"] == 40
    cut = made(input=long, truncate_prompt_tokens=-1)
    assert cut["data"][0]["embedding"] == pytest.approx(whole["data"][0]["embedding"], abs=1e-6)
    few = made(input=long, truncate_prompt_tokens=5)
    ids = tokenizer(long, truncation=True, max_length=5)["input_ids"]
    assert few["data"] == made(input=[ids])["data"]
    assert made(input="a", dimensions=4)["usage"]["prompt_tokens"] == 3
    many = made(input=[f"{n}" for n in range(300)])
    assert [one["index"] for one in many["data"]] == list(range(300))


@pytest.mark.parametrize(
    ("modes", "normalize", "dense"),
    [
        (("cls_token",), False, False),
        (("max_tokens",), False, False),
        (("mean_tokens", "max_tokens"), True, True),
        (("mean_sqrt_len_tokens",), False, False),
        (("weightedmean_tokens",), False, False),
        (("lasttoken",), True, False),
    ],
)
def test_vectors_are_pooled_as_the_folder_says(
    tmp_path: Path, modes: tuple[str, ...], normalize: bool, dense: bool
) -> None:
    describe(tmp_path, *modes, normalize=normalize, dense=dense)
    pooling = read_pooling(tmp_path)
    assert pooling is not None
    torch.manual_seed(0)
    h, lengths = torch.randn(2, 5, 32), [5, 3]
    found = pooling(h, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        own = h[row, :length]
        places = torch.arange(1, length + 1)[:, None]
        by_mode = {
            "cls_token": own[0],
            "max_tokens": own.max(0).values,
            "mean_tokens": own.mean(0),
            "mean_sqrt_len_tokens": own.sum(0) / math.sqrt(length),
            "weightedmean_tokens": (own * places).sum(0) / places.sum(),
            "lasttoken": own[-1],
        }
        # sentence-transformers has the maximum before the mean, in whatever order they are named.
        expected = torch.cat([by_mode[m] for m in sorted(modes, key=[*by_mode].index)])
        if dense:
            layer = load_file(tmp_path / "2_Dense" / "model.safetensors")
            expected = torch.tanh(layer["linear.weight"] @ expected + layer["linear.bias"])
        if normalize:
            expected = expected / expected.norm()
        torch.testing.assert_close(found[row], expected)
    assert pooling.width(32) == len(expected)


def test_modules_that_are_not_computed_are_refused(encoder_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(encoder_base, tmp_path / "base")
    describe(base, "mean_tokens")
    (base / "modules.json").write_text(
        json.dumps([{"type": "a.Transformer", "path": ""}, {"type": "a.LSTM", "path": "1_L"}])
    )
    with pytest.raises(InputError, match="LSTM"):
        open_engine(str(base), {}, embeds=True)
    describe(base, "strange_tokens")
    with pytest.raises(InputError, match="strange_tokens"):
        open_engine(str(base), {}, embeds=True)
    classifier = {**json.loads((base / "config.json").read_text())}
    classifier["architectures"] = ["BertForSequenceClassification"]
    (base / "config.json").write_text(json.dumps(classifier))
    with pytest.raises(InputError, match="lacks classifier"):
        open_engine(str(base), {}, embeds=True)
    classifier["architectures"] = ["BertForTokenClassification"]
    (base / "config.json").write_text(json.dumps(classifier))
    with pytest.raises(InputError, match="is a classifier"):
        open_engine(str(base), {}, embeds=True)
    adapter = embed_adapter(encoder_base, tmp_path / "adapter", 1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for task in ("SEQ_CLS", "TOKEN_CLS"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": task}))
        with pytest.raises(InputError, match=task):
            open_engine(str(encoder_base), {"a": adapter}, embeds=True)


def test_a_body_without_a_head_and_its_adapters_are_served(base: Path, tmp_path: Path) -> None:
    """As e5-mistral is: causal, without `lm_head`, pooled by the last token."""
    folder = tmp_path / "body"
    LlamaModel.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    describe(folder, "lasttoken")
    own = embed_adapter(folder, tmp_path / "own", 5, target_modules=["q_proj", "down_proj"])
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), own).eval()
    ids = AutoTokenizer.from_pretrained(base)("hello")["input_ids"]
    with torch.no_grad():
        h = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    expected = (h / h.norm()).tolist()
    for served in (folder, base):  # the same adapter stands on the causal model too
        with running(served, {"own": own}, ServerOptions(port=0), max_rows=2) as server:
            made = server.openai.embeddings.create(model="own", input=["hello", "more of it"])
            assert made.data[0].embedding == pytest.approx(expected, abs=1e-5)
            refused(server.complete(model="own"), 400)
            status = server.complete(model=str(served)).status_code
            assert status == (400 if served == folder else 200)


def test_the_real_encoder_has_its_published_vectors() -> None:
    folder = encoder()
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell, sharply."]
    asked = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        h = model(**asked).last_hidden_state
    mask = asked["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=-1)
    with running(Path(ENCODER), {}, ServerOptions(port=0), max_rows=4) as server:
        assert server.engine.context_length == 256
        made = server.openai.embeddings.create(model=ENCODER, input=texts)
        for vector, wanted in zip(made.data, expected, strict=True):
            assert vector.embedding == pytest.approx(wanted.tolist(), abs=1e-5)
        ranked = server.post(
            "/v1/rerank", {"model": ENCODER, "query": texts[0], "documents": texts[1:]}
        ).json()["results"]
        assert [one["index"] for one in ranked] == [0, 1]
        assert ranked[0]["relevance_score"] > 0.5 > ranked[1]["relevance_score"] + 0.3


@pytest.mark.exhaustive
def test_litellm_sorts_documents(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = pytest.importorskip("litellm")
    asked: Any = {"model": "hosted_vllm/news", "query": TEXTS[0], "api_key": "none", "top_n": 2}
    for returned in (True, False):
        for base in (server.url, f"{server.url}/v1"):
            found = litellm.rerank(
                **asked, documents=TEXTS, api_base=base, return_documents=returned
            )
            assert found.results[0]["index"] == 0
            assert len(found.results) == 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mean", "mean_tokens"),
        ("cls", "cls_token"),
        ("max", "max_tokens"),
        ("lasttoken", "lasttoken"),
    ],
)
def test_files_of_newer_versions_and_other_architectures_are_read(
    tmp_path: Path, name: str, mode: str
) -> None:
    describe(tmp_path, "x")
    own = {"embedding_dimension": 32, "pooling_mode": name, "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(own))
    (tmp_path / "sentence_xlm-roberta_config.json").write_text('{"max_seq_length": 12}')
    pooling = read_pooling(tmp_path)
    assert pooling is not None
    assert (pooling.modes, pooling.longest, pooling.normalize) == ((mode,), 12, True)


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "roberta": {**SMALL, "max_position_embeddings": 42},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 42},
    "distilbert": {"dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    "modernbert": {**SMALL, "max_position_embeddings": 40, "local_attention": 4},
    "mpnet": {**SMALL, "max_position_embeddings": 42},
    "electra": {**SMALL, "embedding_size": 32, "max_position_embeddings": 40},
    "gemma3_text": {  # EmbeddingGemma's: attention in both directions
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 40,
        "use_bidirectional_attention": True,
        "sliding_window": 4,
    },
}


@pytest.mark.parametrize(
    "family",
    [
        name if name == "roberta" else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in FAMILIES
    ],
)
def test_encoders_of_other_families_embed_rows_of_any_length(tmp_path: Path, family: str) -> None:
    base = save_tiny_encoder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    layers = "n_layers" if family == "distilbert" else "num_hidden_layers"
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **{layers: 2, **FAMILIES[family]},
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    make_attentive(model)
    model.eval().save_pretrained(base)
    describe(base, "mean_tokens")
    texts = ["a", "bc 1, 2.", "the quick brown fox"]
    with open_engine(str(base), {}, dtype="float32", max_rows=4, embeds=True) as engine:
        assert engine.context_length in (40, 41)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        tickets = [engine.submit(one, None, Sampling(embeds=True)) for one in ids]
        for one, ticket in zip(ids, tickets, strict=True):
            [piece] = ticket
            assert piece.embedding is not None
            with torch.no_grad():
                h = model(input_ids=torch.tensor([one])).last_hidden_state[0].mean(0)
            assert piece.embedding == pytest.approx((h / h.norm()).tolist(), abs=1e-5)
