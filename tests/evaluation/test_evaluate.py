"""Base and tuned side by side: the same rows, each prompt answered once, refusals in one line."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from answered import generate_answers
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.held_out import mean_loss
from lorakit.lora import LoraModel


@pytest.fixture
def samples(sample: Callable[..., Sample]) -> list[Sample]:
    return [sample("a", "one"), sample("bb", "two"), sample("a", "another one")]


def test_base_and_tuned_are_scored_on_the_same_rows(
    tuned: LoraModel, tokenizer: Any, samples: list[Sample]
) -> None:
    result = evaluate(tuned, tokenizer, samples, metrics=["loss", "rouge"], max_new_tokens=6)
    assert list(result.scores) == ["loss", "rouge"]
    assert result.scores["loss"]["tuned"] == mean_loss(tuned, tokenizer, samples)
    bare = tuned.unload()
    assert result.scores["loss"]["base"] == pytest.approx(mean_loss(bare, tokenizer, samples))
    assert result.scores["loss"]["base"] != result.scores["loss"]["tuned"]
    prompts = [samples[0].prompt, samples[1].prompt]
    base_answers = generate_answers(bare, tokenizer, prompts, max_new_tokens=6)
    assert [example.base for example in result.examples] == base_answers


def test_references_that_are_too_short_for_bleu_are_named(
    tuned: LoraModel, tokenizer: Any, samples: list[Sample], sample: Callable[..., Sample]
) -> None:
    short = evaluate(tuned, tokenizer, samples, metrics=["bleu"], max_new_tokens=2)
    assert [line for line in short.notices if "bleu is 0 here" in line]
    for rows, metric in (
        ([*samples, sample("c", "one two three four")], "bleu"),
        (samples, "rouge"),
    ):
        result = evaluate(tuned, tokenizer, rows, metrics=[metric], max_new_tokens=2)
        assert not [line for line in result.notices if "bleu" in line]


def test_a_repeated_prompt_is_answered_once_and_has_all_its_references(
    tuned: LoraModel, tokenizer: Any, samples: list[Sample]
) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        tuned,
        tokenizer,
        samples,
        metrics=["exact_match", "loss"],
        max_new_tokens=2,
        batch_size=2,
        on_progress=lambda done, whole: seen.append((done, whole)),
    )
    assert (result.rows, result.prompts) == (3, 2)
    assert [example.references for example in result.examples] == [["one", "another one"], ["two"]]
    whole = 2 * (2 + 3)  # base and tuned: two answers, three losses
    assert seen[-1] == (whole, whole)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_right_answer_scores_full_marks(
    tuned: LoraModel, tokenizer: Any, sample: Callable[..., Sample]
) -> None:
    prompt = sample("hello", "").prompt
    answer = generate_answers(tuned, tokenizer, [prompt], max_new_tokens=6)[0]
    result = evaluate(
        tuned,
        tokenizer,
        [sample("hello", answer)],
        metrics=["exact_match"],
        max_new_tokens=6,
    )
    assert result.scores == {"exact_match": {"base": 0.0, "tuned": 1.0}}


def test_an_evaluation_is_plain_json(
    tuned: LoraModel, tokenizer: Any, samples: list[Sample]
) -> None:
    result = evaluate(tuned, tokenizer, samples, max_new_tokens=2)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert set(result.scores) == {"exact_match", "bleu", "rouge", "loss"}
    assert result.seconds > 0


def test_plain_text_supports_the_loss_alone(tuned: LoraModel, tokenizer: Any) -> None:
    plain = [Sample((), "just some text", "corpus.jsonl:7")]
    result = evaluate(tuned, tokenizer, plain, metrics=["loss"])
    assert result.examples == []
    with pytest.raises(InputError, match=r"corpus.jsonl:7 is plain text.*bleu.*--metrics loss"):
        evaluate(tuned, tokenizer, plain, metrics=["loss", "bleu"])


def test_no_rows_and_unknown_metrics_are_refused(
    tuned: LoraModel, tokenizer: Any, samples: list[Sample]
) -> None:
    with pytest.raises(InputError, match="no rows"):
        evaluate(tuned, tokenizer, [])
    with pytest.raises(InputError, match="did you mean 'rouge'"):
        evaluate(tuned, tokenizer, samples, metrics=["rougue"])


@pytest.mark.parametrize(
    ("question", "answer", "options", "words"),
    [
        ("x" * 600, "a", {}, "the prompt has .* the model reads 512"),
        ("x" * 300, "a", {"metrics": ["exact_match", "loss"], "max_length": 200}, "max_length 200"),
    ],
)
def test_rows_that_are_too_long_are_refused_before_an_answer_is_generated(
    tuned: LoraModel,
    tokenizer: Any,
    sample: Callable[..., Sample],
    question: str,
    answer: str,
    options: dict[str, Any],
    words: str,
) -> None:
    done: list[int] = []
    rows = [sample("short", "a"), sample(question, answer), sample(question + "y", answer)]
    with pytest.raises(InputError, match=rf"rows.jsonl:1: .*{words}.*and 1 more row"):
        evaluate(
            tuned,
            tokenizer,
            rows,
            **{"metrics": ["exact_match"], **options},
            on_progress=lambda now, _: done.append(now),
        )
    assert done == []


def test_an_answer_ends_where_the_model_has_no_more_room(
    tuned: LoraModel, tokenizer: Any, sample: Callable[..., Sample]
) -> None:
    prompt = sample("x" * 480, "a").prompt
    room = 512 - len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    assert 0 < room < 20
    result = evaluate(
        tuned, tokenizer, [sample("x" * 480, "a")], metrics=["rouge"], max_new_tokens=20
    )
    assert any("1 prompt have less room than 20 tokens" in line for line in result.notices)
