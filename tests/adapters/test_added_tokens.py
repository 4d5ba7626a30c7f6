"""An adapter of a model with more tokens than its base is that model: extracted, opened, merged."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorakit
from lorakit.adapters.combine import combine
from lorakit.adapters.extract import extract
from lorakit.adapters.inspect import inspect
from lorakit.adapters.merge import merge
from lorakit.adapters.open import open_adapter
from lorakit.adapters.resize import resize
from lorakit.engine.open_engine import open_engine, open_with
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_adapter, write_adapter
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

SIZE = len(byte_tokenizer())
NEW = ["<tool>", "</tool>"]

MODELS = ["untied", "tied", "gpt2"]


def save_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=SIZE, initializer_range=0.2)
        )
    else:
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=SIZE,
            initializer_range=0.2,
            tie_word_embeddings=kind == "tied",
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="10KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def larger_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(NEW, special_tokens=True)
    return tokenizer


def tune(base: Path, folder: Path, multiple: int | None = None) -> Path:
    """The base with two more tokens, other embeddings, and layers that differ by rank 2."""
    model, tokenizer = loaded(base), larger_tokenizer()
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and (".layers." in name or ".h." in name):
                weight += torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) * 0.05
        embedding = model.get_input_embeddings().weight
        embedding[100:110] += 0.1
        embedding[SIZE:] += 0.3 * torch.randn_like(embedding[SIZE:])
        if model.lm_head.weight is not embedding:
            model.lm_head.weight[SIZE:] -= 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(model: Any, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(rows)[None]).logits


def in_peft(base: Path, adapter: Path, rows: int) -> Any:
    model = loaded(base)
    model.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned` and the adapter `a`, of an untied Llama."""
    folder = tmp_path_factory.mktemp("extracted")
    save_base("untied", folder / "base")
    tune(folder / "base", folder / "tuned")
    extract(str(folder / "base"), str(folder / "tuned"), folder / "a", rank=2)
    return folder


@pytest.mark.parametrize("multiple", few([None, 64], 64))
@pytest.mark.parametrize("kind", MODELS)
def test_extracted_and_merged_again_it_is_the_tuned_model(
    kind: str, multiple: int | None, tmp_path: Path
):
    base, tuned = save_base(kind, tmp_path / "base"), tmp_path / "tuned"
    tune(base, tuned, multiple)
    rows = SIZE + 2 if multiple is None else 320
    report = extract(str(base), str(tuned), tmp_path / "a", rank=2)
    assert report.error < 1e-5
    assert any(f"{rows - SIZE} tokens that" in notice for notice in report.notices)

    merged = merge(tmp_path / "a", tmp_path / "merged")
    assert merged.streamed
    assert any(f"{rows - SIZE} tokens are new" in notice for notice in merged.notices)
    expected, found = loaded(tuned), loaded(tmp_path / "merged")
    assert found.config.vocab_size == rows
    assert found.config.tie_word_embeddings == (kind != "untied")
    torch.testing.assert_close(
        logits_of(found, rows), logits_of(expected, rows), rtol=1e-4, atol=1e-4
    )
    for one, other in zip(embeddings_of(found), embeddings_of(expected), strict=True):
        assert torch.equal(one, other)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<tool>x").input_ids[0] == SIZE

    merge(tmp_path / "a", tmp_path / "loaded", in_memory=True)
    same_tensors(tmp_path / "merged", tmp_path / "loaded")
    assert AutoTokenizer.from_pretrained(tmp_path / "loaded")("</tool>").input_ids == [SIZE + 1]

    opened = open_adapter(tmp_path / "a", dtype="float32")
    assert opened.added_tokens == rows - SIZE
    assert opened.tokenizer("<tool>").input_ids == [SIZE]
    for model in (opened.model, in_peft(base, tmp_path / "a", rows)):
        torch.testing.assert_close(
            logits_of(model, rows), logits_of(expected, rows), rtol=1e-4, atol=1e-4
        )
    with opened.model.disable_adapter():
        bare = logits_of(opened.model, SIZE)
    torch.testing.assert_close(bare[..., :SIZE], logits_of(loaded(base), SIZE))


def embeddings_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def same_tensors(one: Path, two: Path) -> None:
    here, there = (
        {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}
        for folder in (one, two)
    )
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert tensor.dtype == there[key].dtype
        assert torch.equal(tensor, there[key]), key


def test_bfloat16_is_kept_where_the_base_has_it(extracted: Path, tmp_path: Path):
    merge(extracted / "a", tmp_path / "half", dtype="bfloat16")
    merge(extracted / "a", tmp_path / "loaded", dtype="bfloat16", in_memory=True)
    same_tensors(tmp_path / "half", tmp_path / "loaded")


PEFTS: dict[str, dict[str, Any]] = {
    "linear layers": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "tied, saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [SIZE, SIZE + 1]},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    few(
        [
            *(("untied", c) for c in PEFTS if c not in ("embedding", "tied, saved")),
            *(("tied", c) for c in PEFTS),
        ],
        *(
            ("untied", "saved"),
            ("untied", "tokens"),
            ("tied", "tied, saved"),
            ("tied", "embedding"),
        ),
    ),
)
def test_what_peft_trained_on_a_resized_model_opens_and_merges(
    kind: str, case: str, tmp_path: Path
):
    base = save_base(kind, tmp_path / "base")
    model = loaded(base)
    model.resize_token_embeddings(SIZE + 5)
    torch.manual_seed(2)
    config = peft.LoraConfig(
        **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 4, **PEFTS[case]}
    )
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "a")
    larger_tokenizer().save_pretrained(tmp_path / "a")
    expected = logits_of(theirs.eval(), SIZE + 5)

    opened = open_adapter(tmp_path / "a", dtype="float32")
    found = logits_of(opened.model, SIZE + 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    report = merge(tmp_path / "a", tmp_path / "merged")
    assert report.streamed == (case not in ("embedding", "tokens"))
    if (kind, case) == ("tied", "embedding saved"):  # the head is the base's, and apart from it
        merge(tmp_path / "a", tmp_path / "loaded", in_memory=True)
        same_tensors(tmp_path / "merged", tmp_path / "loaded")
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, SIZE + 5), expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<tool>").input_ids == [SIZE]
    fit = inspect(tmp_path / "a", base=str(base)).fit
    assert fit is not None
    assert (fit.fits, fit.added_tokens) == (True, 5)
    resized = loaded(base)
    resized.resize_token_embeddings(SIZE + 5)
    alone = lorakit.PeftModel.from_pretrained(resized, tmp_path / "a")
    torch.testing.assert_close(logits_of(alone, SIZE + 5), expected, rtol=1e-5, atol=1e-5)


def refusal(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    return str(error.value)


def test_what_is_no_vocabulary_with_tokens_behind_the_others_is_not_extracted(
    extracted: Path, tmp_path: Path
):
    base = extracted / "base"

    def refused(tokenizer: Any, rows: int, **change: int) -> str:
        model = loaded(extracted / "tuned")
        model.resize_token_embeddings(rows, mean_resizing=False)
        for name, size in change.items():
            setattr(model, name, torch.nn.Linear(16, size, bias=False))
        folder = tmp_path / "tuned"
        for old in folder.glob("*"):
            old.unlink()
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        message = refusal(extract, str(base), str(folder), tmp_path / "out", rank=2)
        assert not (tmp_path / "out").exists()
        return message

    assert f"model.resize_token_embeddings({SIZE})" in refused(byte_tokenizer(), SIZE - 1)
    assert "is missing or damaged" in refused(None, SIZE + 2)
    (tmp_path / "tuned" / "tokenizer.json").write_text(
        (extracted / "tuned" / "tokenizer.json").read_text()
    )
    unfound = refusal(extract, str(base), str(tmp_path / "tuned"), tmp_path / "out", rank=2)
    assert "no tokenizer_config.json" in unfound
    many = larger_tokenizer()
    many.add_tokens(["<a>", "<b>"])
    assert f"embeddings for {SIZE + 2}" in refused(many, SIZE + 2)
    vocab = json.loads((extracted / "tuned" / "tokenizer.json").read_text())["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    moved = byte_tokenizer()
    moved.backend_tokenizer.model = BPE(vocab=vocab, merges=[])
    moved.add_tokens(NEW, special_tokens=True)
    assert "gives 2 tokens other ids" in refused(moved, SIZE + 2)
    assert "must have the same tokens" in refused(larger_tokenizer(), SIZE + 2, lm_head=SIZE)


def test_later_verbs_keep_the_tokens(extracted: Path, tmp_path: Path):
    base, a = extracted / "base", extracted / "a"
    fit = inspect(a, base=str(base)).fit
    assert fit is not None
    assert (fit.fits, fit.added_tokens) == (True, 2)
    resize(a, tmp_path / "small", rank=1)
    other = make_adapter(base, tmp_path / "other", target_modules=["q_proj"])
    combine([a, other], tmp_path / "both", weights=[1.0, 0.5], method="cat")
    for folder in (tmp_path / "small", tmp_path / "both"):
        merge(folder, tmp_path / f"{folder.name}-merged")
        opened = open_adapter(folder, dtype="float32")
        assert opened.tokenizer("<tool>").input_ids == [SIZE]
        for one, tuned in zip(
            embeddings_of(loaded(tmp_path / f"{folder.name}-merged")),
            embeddings_of(loaded(extracted / "tuned")),
            strict=True,
        ):
            assert torch.equal(one, tuned)
    report = merge([a, other], tmp_path / "sum", weights=[1.0, 0.5])
    assert report.streamed
    torch.testing.assert_close(
        logits_of(loaded(tmp_path / "sum"), SIZE + 2),
        logits_of(loaded(tmp_path / "both-merged"), SIZE + 2),
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_cannot_be_done_with_more_tokens_is_said(extracted: Path, tmp_path: Path):
    base, a = extracted / "base", extracted / "a"
    other = make_adapter(base, tmp_path / "other", target_modules=["q_proj"])
    out = tmp_path / "out"
    for in_memory in (False, True):
        options: dict[str, Any] = {"in_memory": in_memory, "verify": False}
        said = refusal(merge, [a, other], out, weights=[0.5, 1.0], **options)
        assert "give it the weight 1, not 0.5" in said
        assert "give it as the first adapter" in refusal(merge, [other, a], out, **options)
    assert "serve it alone with --merged" in refusal(open_engine, str(base), {"a": a})
    with pytest.raises(InputError, match=rf"model.resize_token_embeddings\({SIZE + 2}\)"):
        lorakit.PeftModel.from_pretrained(loaded(base), a)

    config, tensors = read_adapter(a)
    config.modules_to_save = ["embed_tokens"]
    del tensors["base_model.model.lm_head.weight"]
    write_adapter(tmp_path / "half", config, tensors)
    assert "does not bring their rows of lm_head" in refusal(open_adapter, tmp_path / "half")


def test_a_prompt_with_new_tokens_is_answered_as_by_the_tuned_model(extracted: Path):
    tuned, prompt = loaded(extracted / "tuned"), [SIZE, 40, SIZE + 1, 41]
    with torch.no_grad():
        tokens = tuned.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, len(prompt) :]
    expected = larger_tokenizer().decode(tokens, skip_special_tokens=True)
    with closing(open_with(None, "a", extracted / "a", dtype="float32")) as engine:
        answer = engine.submit(prompt, sampling=Sampling(max_new_tokens=8))
        assert "".join(piece.text for piece in answer) == expected
        assert engine.tokenizer("<tool>").input_ids == [SIZE]


def test_a_tokenizer_beside_an_adapter_that_has_no_rows_for_it_is_not_used(
    extracted: Path, tmp_path: Path
):
    adapter = make_adapter(extracted / "base", tmp_path / "a")
    larger_tokenizer().save_pretrained(adapter)
    with pytest.warns(UserWarning, match="no embeddings for"):
        opened = open_adapter(adapter)
    assert len(opened.tokenizer) == SIZE
    with pytest.warns(UserWarning, match="no embeddings for"):
        merge(adapter, tmp_path / "merged", verify=False)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == SIZE
    (adapter / "tokenizer.json").write_text("{")
    assert "is missing or damaged" in refusal(open_adapter, adapter)


def test_tokens_in_rows_that_the_base_has_already_come_with_the_tokenizer(tmp_path: Path):
    """As padded models have: the new tokens need no new rows."""
    base, tuned = save_base("untied", tmp_path / "base"), tmp_path / "tuned"
    model = loaded(base)
    model.resize_token_embeddings(320)
    model.save_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] += 1
    model.save_pretrained(tuned)
    larger_tokenizer().save_pretrained(tuned)
    report = extract(str(base), str(tuned), tmp_path / "a", rank=1)
    assert report.whole == []
    assert open_adapter(tmp_path / "a").added_tokens == 0
    with closing(open_engine(str(base), {"a": tmp_path / "a"}, dtype="float32")) as engine:
        assert engine.tokenizer_of("a")("<tool>").input_ids == [SIZE]
        assert len(engine.tokenizer_of(None)) == SIZE
    merge(tmp_path / "a", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<tool>").input_ids == [SIZE]


def test_adapters_of_one_resized_base_are_added_up(extracted: Path, tmp_path: Path):
    resized = loaded(extracted / "base")
    resized.resize_token_embeddings(SIZE + 2)
    resized.save_pretrained(tmp_path / "resized")
    byte_tokenizer().save_pretrained(tmp_path / "resized")
    adapters = [make_adapter(tmp_path / "resized", tmp_path / f"{seed}", seed) for seed in (0, 1)]
    merge(adapters, tmp_path / "expected")
    for adapter in adapters:  # as PEFT saves them beside a base that has not been saved
        config, tensors = read_adapter(adapter)
        config.base_model_name_or_path = str(extracted / "base")
        tensors["base_model.model.model.embed_tokens.weight"] = embeddings_of(resized)[0].detach()
        tensors["base_model.model.lm_head.weight"] = embeddings_of(resized)[1].detach()
        write_adapter(adapter, config, tensors)
    for in_memory in (False, True):
        report = merge(adapters, tmp_path / f"{in_memory}", in_memory=in_memory)
        assert report.streamed != in_memory
        same_tensors(tmp_path / f"{in_memory}", tmp_path / "expected")


def test_a_frozen_embedding_of_another_base_is_refused(tmp_path: Path):
    base = save_base("untied", tmp_path / "base")
    model = loaded(base)
    model.resize_token_embeddings(SIZE + 2)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    other = loaded(base)
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for call in (
        lambda: open_adapter(tmp_path / "a", base=str(tmp_path / "other")),
        lambda: merge(tmp_path / "a", tmp_path / "out", base=str(tmp_path / "other"), verify=False),
    ):
        assert "differs from the base's in its first row" in refusal(call)


@pytest.mark.filterwarnings("ignore:.*belong to no token")
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_an_adapter_for_fewer_rows_than_a_padded_base_has_is_read(kind: str, tmp_path: Path):
    base = save_base(kind, tmp_path / "small")
    padded = loaded(base)
    torch.manual_seed(3)
    padded.resize_token_embeddings(SIZE + 13, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    byte_tokenizer().save_pretrained(tmp_path / "padded")
    model = loaded(tmp_path / "padded")
    model.resize_token_embeddings(SIZE, mean_resizing=False)  # as scripts do
    saved = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, r=4)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "a")
    expected = logits_of(theirs.eval(), SIZE)
    where = str(tmp_path / "padded")
    opened = open_adapter(tmp_path / "a", base=where, dtype="float32")
    torch.testing.assert_close(logits_of(opened.model, SIZE), expected, rtol=1e-5, atol=1e-5)
    merge(tmp_path / "a", tmp_path / "merged", base=where)
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, SIZE), expected, rtol=1e-4, atol=1e-5)
    fit = inspect(tmp_path / "a", base=where).fit
    assert fit is not None
    assert fit.fits

    cut = loaded(tmp_path / "padded")
    cut.resize_token_embeddings(SIZE - 9, mean_resizing=False)
    peft.get_peft_model(cut, config).save_pretrained(tmp_path / "cut")
    words = refusal(open_adapter, tmp_path / "cut", base=where)
    assert f"a vocabulary of {SIZE - 9} tokens" in words
