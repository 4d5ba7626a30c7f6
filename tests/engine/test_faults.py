"""Whatever one row brings, it ends that row alone, and the others are answered as ever."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, RecurrentGemmaConfig

from answered import each_alone, tokens
from lorakit.engine import batch
from lorakit.engine.engine import Engine
from lorakit.engine.grammar import Grammar
from lorakit.engine.open_engine import open_engine
from lorakit.engine.requests import AnswerPiece, Ticket
from lorakit.engine.sampling import Sampling
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

Start = Callable[..., Engine]
GREEDY = Sampling(max_new_tokens=16, logprobs=0)
PROMPTS: dict[str | None, list[int]] = {
    "shop": [40, 41, 42],
    None: [90],
    "poet": list(range(100, 130)),
    "few": [7, 9, 7],
}
WHO = list(PROMPTS)


class Panic(BaseException):
    """No Exception, as the panics of Rust's tokenizers are not."""


@pytest.fixture(scope="module")
def expected(base: Path, adapters: dict[str, Path]) -> dict[str | None, list[int]]:
    found = each_alone(base, adapters, ((ids, name) for name, ids in PROMPTS.items()), 16)
    return dict(zip(PROMPTS, found, strict=True))


def pieces(ticket: Ticket) -> list[AnswerPiece]:
    """All pieces of an answer, which must end within seconds."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(list, ticket).result(timeout=120)


def check(
    engine: Engine,
    expected: dict[str | None, list[int]],
    guilty: str | None,
    sampling: Sampling = GREEDY,
) -> str:
    """Asks all at once, of whom the guilty one must end with an error, which is returned."""
    tickets = {
        name: engine.submit(ids, name, sampling if name == guilty else GREEDY)
        for name, ids in PROMPTS.items()
    }
    with ThreadPoolExecutor(4) as threads:
        found = {name: threads.submit(list, ticket) for name, ticket in tickets.items()}
        ended = {name: answer.result(timeout=120) for name, answer in found.items()}
    for name, answer in ended.items():
        if name != guilty:
            chosen = [token.token for piece in answer for token in piece.logprobs]
            assert chosen == expected[name], name
    assert engine.alive()
    innocent = next(name for name in WHO if name != guilty)
    assert tokens(engine.submit(PROMPTS[innocent], innocent, GREEDY)) == expected[innocent]
    assert [piece.finish_reason for piece in ended[guilty]][-1] == "error"
    assert all(piece.finish_reason is None for piece in ended[guilty][:-1])
    return ended[guilty][-1].error


def own_token(expected: dict[str | None, list[int]], guilty: str | None, late: bool = False) -> int:
    """A token that the guilty row's answer has, and no other answer or prompt."""
    others = {token for name in WHO if name != guilty for token in expected[name] + PROMPTS[name]}
    own = [t for t in expected[guilty] if t not in others | set(PROMPTS[guilty])]
    return own[-1 if late else 0]


@contextmanager
def without_decoding(token: int, error: BaseException) -> Iterator[None]:
    """The tokenizer's `decode` raises where `token` comes."""
    decode = PreTrainedTokenizerFast.decode

    def broken(self: Any, ids: Any, *args: Any, **options: Any) -> Any:
        if token in ids:
            raise error
        return decode(self, ids, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "decode", broken)
        yield


@pytest.mark.parametrize("guilty", ["shop", None])
@pytest.mark.parametrize("error", [IndexError("piece id is out of range"), Panic("regex")])
@pytest.mark.parametrize("logprobs", few([None, 2], None))
def test_a_tokenizer_that_cannot_decode_a_token_ends_the_rows_that_have_it(
    start: Start, expected: Any, guilty: str | None, error: BaseException, logprobs: int | None
):
    engine = start()
    asked = Sampling(max_new_tokens=16, logprobs=logprobs)
    with without_decoding(own_token(expected, guilty), error):
        said = check(engine, expected, guilty, asked)
    assert f"{type(error).__name__}: {error}" in said


def test_a_tokenizer_that_fails_when_an_answer_is_cancelled_ends_that_one(
    start: Start, expected: Any
):
    engine = start()
    ticket = engine.submit([8, 9], "mixed", Sampling(max_new_tokens=400))
    next(iter(ticket))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: 1 / 0)
        ticket.cancel()
        assert pieces(ticket)[-1].finish_reason in ("cancelled", "error")
        other = engine.submit([8, 9], "mixed", Sampling(max_new_tokens=400))
        engine.close()  # cancels it
        assert pieces(other)[-1].finish_reason in ("cancelled", "error")


@pytest.mark.parametrize("step", ["prompt", "part of a prompt", "answer"])
def test_a_forward_that_fails_for_one_row_ends_that_one(
    start: Start, expected: Any, step: str, monkeypatch: pytest.MonkeyPatch
):
    if step == "part of a prompt":
        monkeypatch.setattr(batch, "CHUNK", 8)
    engine, guilty = start(), "poet"
    bad = 129 if "prompt" in step else own_token(expected, guilty, late=True)

    def refuse(_module: Any, given: Any, _options: Any = None) -> None:
        if (given[0] == bad).any():
            raise RuntimeError("no memory for this row")

    hook = engine._model.get_input_embeddings().register_forward_pre_hook(refuse)
    assert "no memory for this row" in check(engine, expected, guilty)
    hook.remove()
    assert tokens(engine.submit(PROMPTS[guilty], guilty, GREEDY)) == expected[guilty]


@pytest.mark.parametrize("value", few([torch.inf, torch.nan], torch.nan))
@pytest.mark.parametrize("step", ["prompt", "part of a prompt", "answer"])
def test_logits_that_are_not_finite_end_their_row_alone(
    start: Start, expected: Any, step: str, value: float, monkeypatch: pytest.MonkeyPatch
):
    if step == "part of a prompt":
        monkeypatch.setattr(batch, "CHUNK", 8)
    engine, guilty = start(), "poet"
    bad = 110 if "prompt" in step else own_token(expected, guilty)
    weight: Any = engine._model.get_input_embeddings().weight
    right = weight[bad].clone()
    with torch.no_grad():
        weight[bad] = value
        # Without log-probabilities it is the greedy row's short way.
        said = check(engine, expected, guilty, Sampling(max_new_tokens=16))
        weight[bad] = right
    assert "'poet' are NaN or Inf" in said
    # Nothing of it is left in the places of the batch.
    tickets = {name: engine.submit(ids, name, GREEDY) for name, ids in PROMPTS.items()}
    assert {name: tokens(ticket) for name, ticket in tickets.items()} == expected


def test_an_adapter_that_overflows_harms_no_row_beside_it(
    start: Start, base: Path, adapters: dict[str, Path], expected: Any, tmp_path: Path
):
    huge = make_adapter(base, tmp_path / "huge", 5, r=4)
    path = huge / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(path).items()}, path)
    engine = start(adapters={**adapters, "huge": huge}, max_rows=5)
    for _ in range(2):
        broken = engine.submit([9, 8], "huge", Sampling(max_new_tokens=9))
        tickets = {name: engine.submit(ids, name, GREEDY) for name, ids in PROMPTS.items()}
        assert "'huge' are NaN or Inf" in pieces(broken)[-1].error
        assert {name: tokens(ticket) for name, ticket in tickets.items()} == expected


def test_an_adapter_that_cannot_be_added_to_the_bank_ends_its_requests(start: Start, expected: Any):
    engine = start()
    version = engine.pool.version("poet")
    right = engine.pool._loaded[version]
    cut = copy.deepcopy(right.parts)
    for part in cut:
        weight = part.values["lora_A"].weight
        weight.data = weight[:, 1:].detach()
    engine.pool._loaded[version] = replace(right, parts=cut)
    assert "size" in check(engine, expected, "poet")
    engine.pool._loaded[version] = right
    assert tokens(engine.submit(PROMPTS["poet"], "poet", GREEDY)) == expected["poet"]


def test_a_listener_whose_loop_is_closed_ends_its_row_alone(start: Start, expected: Any):
    engine = start()
    ticket = engine.submit([8, 9], "mixed", Sampling(max_new_tokens=400))

    async def leave_without_closing() -> Any:
        stream = ticket.pieces()
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(leave_without_closing())
    loop.close()
    tickets = {name: engine.submit(ids, name, GREEDY) for name, ids in PROMPTS.items()}
    assert {name: tokens(ticket) for name, ticket in tickets.items()} == expected
    assert ticket.cancelled.is_set()
    del stream


# --- models that `generate` computes ------------------------------------------------------------


@pytest.fixture(scope="module")
def uncarried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncarried")
    torch.manual_seed(3)
    config = RecurrentGemmaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        lru_width=32,
        block_types=["recurrent", "attention"],
        attention_window_size=128,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # as initialised it repeats itself
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if parameter.dim() == 2 and "embed" not in name else 1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", ["decode", "forward", "NaN"])
def test_a_row_that_fails_ends_alone_where_generate_computes(uncarried: Path, fault: str):
    asked = {number: [40 + number, 41, 42] for number in range(3)}
    answers_alone = each_alone(uncarried, {}, ((ids, None) for ids in asked.values()), 12)
    right = dict(zip(asked, answers_alone, strict=True))
    others = {token for number in (1, 2) for token in right[number] + asked[number]}
    bad = next(token for token in right[0][2:] if token not in others | set(asked[0]))
    engine = open_engine(str(uncarried), {}, dtype="float32")
    embedding: Any = engine._model.get_input_embeddings()

    def refuse(_module: Any, given: Any) -> None:
        if (given[0] == bad).any():
            raise RuntimeError("no memory for this row")

    def answers() -> dict[int, list[AnswerPiece]]:
        tickets = {
            number: engine.submit(ids, None, Sampling(max_new_tokens=12, logprobs=0))
            for number, ids in asked.items()
        }
        return {number: pieces(ticket) for number, ticket in tickets.items()}

    try:
        assert engine.notices
        if fault == "forward":
            embedding.register_forward_pre_hook(refuse)
        elif fault == "NaN":
            with torch.no_grad():
                embedding.weight[bad] = torch.nan
        if fault == "decode":
            with without_decoding(bad, Panic("regex")):
                found = answers()
        else:
            found = answers()
        assert found[0][-1].finish_reason == "error"
        for number in (1, 2):
            chosen = [token.token for piece in found[number] for token in piece.logprobs]
            assert chosen == right[number]
        assert engine.alive()
        assert (
            tokens(engine.submit(asked[1], None, Sampling(max_new_tokens=12, logprobs=0)))
            == (right[1])
        )
    finally:
        engine.close()


def test_answers_of_a_given_form_are_written_by_generate_too(uncarried: Path):
    grammar = Grammar.of_schema({"type": "array", "items": {"enum": [1, 2]}, "minItems": 2})
    settings = Sampling(1.0, max_new_tokens=12, seed=3)
    with Engine(str(uncarried), dtype="float32") as engine:
        assert engine.notices
        alone = pieces(engine.submit([41, 42], sampling=settings))
        formed = engine.submit([40], sampling=replace(settings, grammar=grammar))
        beside = engine.submit([41, 42], sampling=settings)
        text = "".join(piece.text for piece in pieces(formed))
        assert [p.text for p in pieces(beside)] == [p.text for p in alone]
    assert text.replace(" ", "").replace("\n", "").replace("\t", "")[:2] in ("[1", "[2")
