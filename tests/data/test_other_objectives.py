"""Rows for other objectives are refused by what they are, and never learned by half."""

from pathlib import Path
from typing import Any

import pytest

from lorakit.data.formats import to_sample
from lorakit.data.mixing import mix
from lorakit.data.sources import Row
from lorakit.errors import InputError

USER = {"role": "user", "content": "Q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("GOOD", "BAD"))
TALK = [USER, GOOD]
HH = {"chosen": "\n\nHuman: Q\n\nAssistant: GOOD", "rejected": "\n\nHuman: Q\n\nAssistant: BAD"}
SHAREGPT = [
    {"from": "human", "value": "Q"},
    {"from": "gpt", "value": "OLD"},
    {"from": "human", "value": "Q2"},
]


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(InputError, match=r"^rows.jsonl:3: ") as caught:
        to_sample(Row(values, Path("rows.jsonl"), 3))
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        HH,
        {"prompt": "Q", "chosen": "GOOD", "rejected": "BAD"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "messages": TALK, "chosen": TALK, "rejected": [USER, BAD]},
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "GOOD"},
            "rejected": {"from": "gpt", "value": "BAD"},
        },
        {"messages": TALK, "rejected_response": "BAD"},
        {"messages": TALK, "rejected_messages": [USER, BAD]},
        {"instruction": "Q", "input": "", "output": "GOOD", "rejected": "BAD"},
        {"prompt": "Q", "response": "GOOD", "response_rejected": "BAD"},
        {"text": "Q", "Chosen": "GOOD"},
        {"instruction": "Q", "output": ["GOOD", "BAD"]},
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"prompt": "Q", "response_0": "GOOD", "response_1": "BAD", "better_response_id": 0},
    ],
)
def test_preference_pairs_are_refused_by_name(values: dict[str, Any]) -> None:
    assert "preference pair" in refused(values)


@pytest.mark.parametrize("label", [True, False, "True", "false", 1, 0])
@pytest.mark.parametrize(
    "values",
    [
        {"messages": TALK},
        {"conversations": SHAREGPT},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "output": "A"},
    ],
)
def test_judged_answers_are_refused_by_name(values: dict[str, Any], label: Any) -> None:
    message = refused({**values, "label": label})
    assert "KTO" in message
    assert "'label'" in message
    assert "KTO" in refused({**values, "kto_tag": label})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}, "reward model"),
        ({"message_id": "1", "parent_id": None, "role": "prompter", "text": "Q"}, "tree"),
        ({"prompt": "<image>Q", "completion": "A", "videos": ["a.mp4"]}, "'videos'"),
        ({"messages": TALK, "audios": ["a.wav"]}, "'audios'"),
    ],
)
def test_other_rows_that_fit_a_format_by_half_are_refused(
    values: dict[str, Any], word: str
) -> None:
    assert word in refused(values)


@pytest.mark.parametrize(
    "more",
    [
        {"chosen": None, "rejected": ""},
        {"label": "sports"},
        {"label": None},
        {"images": []},
        {"rejectedness": "x"},
        {"preferred_language": "en"},
    ],
)
def test_rows_that_only_look_like_it_are_learned(more: dict[str, Any]) -> None:
    values = {"prompt": "Q", "completion": "A", **more}
    assert to_sample(Row(values, Path("rows.jsonl"), 3)).reference == "A"


def test_a_mapping_chooses_what_of_a_pair_is_learned(write_rows: Any) -> None:
    path = write_rows([{"prompt": "Q", "chosen": "GOOD", "rejected": "BAD"}])
    mixture = mix(str(path), {"prompt": "prompt", "completion": "chosen"})
    assert [sample.reference for sample in mixture.samples] == ["GOOD"]
    assert "rejected" in mixture.notices[0]


def test_all_pairs_of_a_file_are_counted(write_rows: Any) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: is a preference pair .*and 9 more rows"):
        mix(str(write_rows([HH] * 10)))
