"""How a row's next token is chosen, and its text made: by transformers' and OpenAI's rules."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

from answered import text, tokens
from lorakit.engine.choosing import Chooser
from lorakit.engine.engine import Engine
from lorakit.engine.restricting import restrict
from lorakit.engine.sampling import Sampling
from lorakit.engine.text import AnswerText
from lorakit.errors import InputError
from tiny import byte_tokenizer

Start = Callable[..., Engine]
PROMPT = list(range(30, 50))


def drawn(logits: list[float], sampling: Sampling, times: int = 4000) -> Counter[int]:
    chooser = Chooser(replace(sampling, seed=1), [0], torch.device("cpu"))
    return Counter(chooser.choose(torch.tensor(logits)) for _ in range(times))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.69), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(temperature=0.5, top_k=3, min_p=0.3), [16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(sampling: Sampling, expected: list[float]):
    found = drawn([math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], sampling)
    possible = [i for i, p in enumerate(expected) if p]
    assert set(found) == set(possible)
    times = found.total()
    for i in possible:  # within four standard deviations of the binomial distribution
        allowed = 4 * math.sqrt(times * expected[i] * (1 - expected[i]))
        assert abs(found[i] - times * expected[i]) <= allowed


def test_penalties_are_taken_off_as_openai_and_transformers_do():
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    chooser = Chooser(sampling, [3], torch.device("cpu"))
    for token in (1, 1, 0):
        chooser.took(token)
    # 1: 2.0 - 0.5 - 2 * 0.25 = 1.0; 0: 1.6 - 0.5 - 0.25 = 0.85; 3 is the prompt's, not counted.
    for logits, best in (([1.6, 2.0, 0.99, 0.0], 1), ([1.6, 2.0, 1.01, 0.0], 2)):
        assert chooser.choose(torch.tensor(logits)) == best
    chooser = Chooser(Sampling(repetition_penalty=2.0), [3], torch.device("cpu"))
    chooser.took(1)
    # Divided where positive, multiplied where negative, the prompt's too.
    assert chooser.choose(torch.tensor([0.9, 2.0, 0.8, 2.1])) == 3
    assert chooser.choose(torch.tensor([1.1, 2.0, 0.8, 2.1])) == 0
    assert chooser.choose(torch.tensor([-1.9, -1.0, -1.95, -1.0])) == 0


def test_the_rules_are_those_of_generate(start: Start):
    """The same processors, in the order in which `generate` puts them."""
    from transformers import GenerationConfig

    engine = start()
    settings = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3
    )
    own = engine._model._get_logits_processor(settings, input_ids_seq_length=20)
    torch.manual_seed(0)
    logits = torch.randn(1, 259) * 3
    ids = torch.tensor([PROMPT])
    expected = LogitsProcessorList(own)(ids, logits.clone())[0].softmax(-1)
    sampling = Sampling(
        temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3, seed=3
    )
    chooser = Chooser(sampling, PROMPT, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        wanted = int(expected.multinomial(1, generator=generator))
        assert chooser.choose(logits[0].clone()) == wanted


def test_a_seed_repeats_an_answer_whoever_else_is_in_the_batch(start: Start):
    engine = start()
    sampling = Sampling(temperature=1.0, max_new_tokens=20, seed=5, logprobs=0)
    first = tokens(engine.submit(PROMPT, "shop", sampling))
    others = [engine.submit(PROMPT, "poet", replace(sampling, seed=i)) for i in range(3)]
    again = engine.submit(PROMPT, "shop", sampling)
    assert tokens(again) == first
    answers = {tuple(tokens(ticket)) for ticket in others}
    assert len(answers) == 3
    unseeded = [engine.submit(PROMPT, "shop", replace(sampling, seed=None)) for _ in range(3)]
    assert len({tuple(tokens(ticket)) for ticket in unseeded}) == 3


def test_log_probabilities_are_the_models_own_before_any_setting(start: Start):
    engine = start()
    asked = Sampling(temperature=0.3, top_k=1, presence_penalty=2, logprobs=3, max_new_tokens=4)
    pieces = list(engine.submit(PROMPT, None, asked))
    chosen = [c for piece in pieces for c in piece.logprobs]
    assert len(chosen) == 4
    ids = torch.tensor([PROMPT + [c.token for c in chosen]])
    with torch.inference_mode():
        logs = engine._model(input_ids=ids).logits[0].log_softmax(-1)
    for i, found in enumerate(chosen):
        own = logs[len(PROMPT) - 1 + i]
        assert found.logprob == pytest.approx(own[found.token].item(), abs=1e-4)
        assert [t.token for t in found.top] == own.topk(3).indices.tolist()
        assert found.top[1].logprob == pytest.approx(own.topk(3).values[1].item(), abs=1e-4)
    assert "".join(p.text for p in pieces) == engine.tokenizer.decode([c.token for c in chosen])


def test_what_may_not_come_next_is_taken_out_of_each_row_alone():
    settings = [
        Sampling(logit_bias=((1, 2.5), (3, -100.0))),
        Sampling(allowed_token_ids=(0, 2)),
        Sampling(min_tokens=3),
        Sampling(),
        Sampling(allowed_token_ids=(1,)),
    ]
    ends = [frozenset[int](), frozenset[int](), frozenset({0}), frozenset[int](), frozenset({1})]
    logits = torch.arange(4.0).repeat(5, 1)
    refused = restrict(logits, settings, ends, [None] * 5)
    inf = math.inf
    assert logits.tolist() == [
        [0, 3.5, 2, -97],
        [0, -inf, 2, -inf],
        [-inf, 1, 2, 3],
        [0, 1, 2, 3],
        [-inf] * 4,
    ]
    assert [*refused] == [4]


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(start: Start):
    engine = start()
    whole = Sampling(temperature=1.0, seed=2, max_new_tokens=60)
    answer = text(engine.submit(PROMPT, "shop", whole))
    for begin, end in ((10, 12), (20, 25), (7, 8)):
        stop = answer[begin:end]
        pieces = list(engine.submit(PROMPT, "shop", replace(whole, stop=("\0never", stop))))
        assert "".join(p.text for p in pieces) == answer[: answer.index(stop)]
        assert pieces[-1].finish_reason == "stop"


def read_by_token(content: str, *stop: str) -> tuple[str, list[str], bool]:
    """The text that is given out, its pieces, and whether a stop text ended it."""
    tokenizer = byte_tokenizer()
    reader = AnswerText(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(content, add_special_tokens=False):
        pieces.append(reader.add(token))
        if reader.stopped:
            break
    pieces.append(reader.finish())
    return "".join(pieces), pieces, reader.stopped


def test_characters_of_several_tokens_come_whole():
    content = "naïve 三国 👩‍👩‍👧 end"
    found, pieces, _ = read_by_token(content)
    assert found == content
    assert not any("\ufffd" in piece for piece in pieces)
    tokenizer = byte_tokenizer()
    reader = AnswerText(tokenizer)
    cut = tokenizer.encode("三", add_special_tokens=False)[:2]
    assert "".join(reader.add(token) for token in cut) == ""
    assert reader.finish() == "\ufffd"  # an answer that ends inside of a character says so


@pytest.mark.parametrize(
    ("content", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("abababac", ["abac"], "abab"),
        ("to the en", ["end"], "to the en"),
        ("国家三国", ["三国"], "国家"),
        ("x", ["x"], ""),
    ],
)
def test_what_may_be_the_beginning_of_a_stop_text_is_held_back(
    content: str, stop: list[str], expected: str
):
    found, pieces, stopped = read_by_token(content, *stop)
    assert found == expected
    assert stopped == (found != content)
    given = ""
    for piece in pieces:
        given += piece
        assert expected.startswith(given)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("max_new_tokens", 0),
        ("seed", 2**64),
        ("stop", ("a", "")),
        ("logprobs", -1),
    ],
)
def test_settings_out_of_their_range_are_refused_by_name(field: str, value: object):
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
