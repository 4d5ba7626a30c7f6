"""The built-in rewards, beside TRL's where TRL has the same."""

import pytest

from lorakit.rewards.builtin import built_in

_THOUGHT, _SAID = "<think>a</think>", "<answer>b</answer>"


def scores(name: str, completions: list, settings: dict | None = None, **columns: list) -> list:
    ids = [[1] * len(one) for one in completions]
    given = {"completion_ids": ids, "prompts": [""] * len(completions)} | columns
    return built_in(name, settings or {})(completions=completions, **given)


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("name", "settings", "completions", "columns", "expected"),
    [
        ("exact_match", {}, ["a ", "b"], {"reference": ["a", None]}, [1, None]),
        ("exact_match", {"column": "n"}, ["4", "4.0"], {"n": [4.0, 4]}, [1, 0]),
        (
            "exact_match",
            {"column": "n", "after": "####"},
            ["so #### 4", "4"],
            {"n": ["4", "x #### 4"]},
            [1, 0],
        ),
        ("exact_match", {"ignore_case": True}, [said("Yes")], {"reference": ["yes"]}, [1]),
        ("regex", {"pattern": "^a.b$"}, ["a\nb", "ab"], {}, [1, 0]),
        ("regex", {"pattern": "[0-9]+", "full": True}, [" 42 ", "42 eggs"], {}, [1, 0]),
        ("json", {}, ['{"a": 1}', "{", "NaN", "1 2", "```json\n{}\n```"], {}, [1, 0, 0, 0, 0]),
        ("json", {"kind": "object", "fenced": True}, ["[]", "```json\n{}\n```"], {}, [0, 1]),
        ("json", {}, ["[" * 100_000], {}, [0]),
        ("json_schema", {"schema": {"required": ["a"]}}, ['{"a": 1}', "{}", "x"], {}, [1, 0, 0]),
        (
            "json_schema",
            {"column": "s"},
            ["1", "1"],
            {"s": ['{"type": "string"}', None]},
            [0, None],
        ),
        (
            "format",
            {"tags": ["think", "answer"]},
            [f"{_THOUGHT}\n{_SAID}", _SAID, f"{_THOUGHT}x{_SAID}"],
            {},
            [1, 0, 0],
        ),
        ("format", {"opened": True}, ["a</think>b", "a"], {}, [1, 0]),
        ("length", {"target": 4, "unit": "characters"}, ["abcd", "ab", "a" * 9], {}, [1, 0.5, 0]),
        ("length", {"target": 2, "unit": "words"}, ["a b"], {}, [1]),
        (
            "math_verify",
            {},
            [r"\boxed{\frac{2}{4}}", "x"],
            {"solution": [r"\frac{1}{2}", ""]},
            [1, None],
        ),
    ],
)
def test_completions_are_scored(name, settings, completions, columns, expected):
    assert scores(name, completions, settings, **columns) == expected


def test_a_schema_that_refers_elsewhere_is_not_fetched():
    with pytest.raises(Exception, match="example"):
        scores("json_schema", ["1"], {"schema": {"$ref": "https://example.com/schema.json"}})


def test_they_are_trls_where_trl_has_them():
    from trl.rewards import (
        accuracy_reward,
        get_repetition_penalty_reward,
        get_soft_overlong_punishment,
        think_format_reward,
    )

    ids = [[1] * n for n in range(14)] + [[1, 2, 3, 1, 2, 3, 4]]
    texts = ["a"] * len(ids)
    overlong = {"max_completion_len": 10, "soft_punish_cache": 4}
    mine = built_in("overlong", overlong)(completions=texts, completion_ids=ids)
    assert mine == get_soft_overlong_punishment(**overlong)(ids)
    mine = built_in("repetition", {"ngram_size": 2})(completions=texts, completion_ids=ids)
    assert mine == get_repetition_penalty_reward(2)(ids)
    texts = ["<think>a</think>b", "<think>a", "x<think>a</think>", "<think>a<think></think>", "a"]
    assert scores("format", [said(t) for t in texts]) == think_format_reward(
        [said(t) for t in texts]
    )
    solutions = ["$\\frac{1}{3}$", "$4$", "", "$x^2$"]
    answers = [said(t) for t in (r"\boxed{1/3}", "the answer is $5$", r"\boxed{1}", "$x*x$")]
    assert scores("math_verify", answers, solution=solutions) == accuracy_reward(answers, solutions)
