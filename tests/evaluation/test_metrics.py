"""Metrics against values worked out by hand, and the names on the command line."""

import math

import pytest

from lorakit.errors import InputError
from lorakit.evaluation.metrics import METRICS, bleu, exact_match, parse_metrics, rouge


def test_an_exact_match_may_be_with_any_reference_and_ignores_white_space_at_the_ends() -> None:
    answers = ["a b\n", "b", "A b", ""]
    references = [["x", " a b"], ["b "], ["a b"], ["a"]]
    assert exact_match(answers, references) == 0.5


def test_bleu_is_the_geometric_mean_of_the_precisions_times_the_brevity_penalty() -> None:
    # 8 words; those in a row that the reference has: 7 of 8, 6 of 7, 5 of 6, 4 of 5. Same length.
    answer = "the cat sat on the mat today again"
    reference = "the cat sat on the mat today yes"
    precisions = [7 / 8, 6 / 7, 5 / 6, 4 / 5]
    assert bleu([answer], [[reference]]) == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_bleu_of_a_short_answer_is_lowered_by_the_brevity_penalty() -> None:
    expected = 100 * math.exp(1 - 6 / 4)
    assert bleu(["one two three four"], [["one two three four five six"]]) == pytest.approx(
        expected
    )


def test_bleu_takes_a_different_number_of_references_for_each_prompt() -> None:
    answers = ["the red mug is on the table", "send it to me in the morning"]
    one_each = bleu(answers, [["no word of this fits here at all"], [answers[1]]])
    ragged = bleu(answers, [["no word of this fits here at all", answers[0]], [answers[1]]])
    assert one_each < 60
    assert ragged == pytest.approx(100)
    assert bleu(answers[::-1], [[answers[1]], ["nothing", "x", answers[0]]]) == pytest.approx(100)


@pytest.mark.parametrize(
    "text", ["今天天气很好我们去公园", "きょうはとてもいいてんきです", "오늘은날씨가정말좋습니다"]
)
def test_bleu_and_rouge_see_more_than_one_word_in_text_without_spaces(text: str) -> None:
    nearly = text[:-1] + "x"
    assert 50 < bleu([nearly], [[text]]) < 100
    assert bleu([text], [[text]]) == pytest.approx(100)


def test_rouge_is_the_longest_common_subsequence_as_an_f_measure() -> None:
    # In common: "the cat on mat", 4 words; precision 4/5, recall 4/6.
    score = rouge(["the cat lay on mat"], [["the cat sat on the mat"]])
    assert score == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_rouge_takes_the_best_reference_and_then_the_mean_over_prompts() -> None:
    assert rouge(["a b", "c d"], [["x y", "a b"], ["c x", "y z"]]) == pytest.approx((1 + 0.5) / 2)


def test_rouge_of_chinese_counts_characters() -> None:
    assert rouge(["我喜欢红茶"], [["我喜欢绿茶"]]) == pytest.approx(4 / 5)


def test_rouge_keeps_accented_words_and_ignores_case_and_punctuation() -> None:
    assert rouge(["Malmö, Kraków!"], [["malmö kraków"]]) == 1


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_answer_scores_nothing(name: str) -> None:
    assert METRICS[name]([""], [["a mug"]]) == 0


def test_metric_names_are_read_once_each_in_their_order() -> None:
    assert parse_metrics(" rouge,exact_match, loss,rouge,") == ["rouge", "exact_match", "loss"]


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        InputError, match=r"'exact-match' is not .*did you mean 'exact_match'.*loss"
    ):
        parse_metrics("exact-match")
    with pytest.raises(InputError, match="no metric is named"):
        parse_metrics(" ,")
