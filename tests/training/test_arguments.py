"""Every field of `TrainingArguments` has its place; a setting that does nothing is refused."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from lorakit.errors import InputError
from lorakit.training.arguments import ARGUMENTS, refusal
from lorakit.training.recipe import load_recipe

BASE = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "out"}
FIELDS = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
TURNED_AWAY = [name for name, own in ARGUMENTS.items() if own.treatment != "honoured"]


def test_every_field_of_the_installed_transformers_is_placed():
    assert not set(FIELDS) - set(ARGUMENTS)


def test_the_tables_of_the_documents_are_those_of_the_code():
    script = Path(__file__).parents[2] / "docs" / "tables.py"
    pages = runpy.run_path(str(script))["pages"]()
    assert len(pages) == 2
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/tables.py"


@pytest.mark.parametrize("name", [name for name in TURNED_AWAY if name in FIELDS])
def test_what_is_reserved_or_without_effect_is_refused_unless_it_says_what_happens(name: str):
    argument = ARGUMENTS[name]
    assert argument.note
    with pytest.raises(InputError) as error:
        load_recipe(BASE, [(f"training.{name}", "another value")])
    assert f"training.{name}" in str(error.value)
    assert argument.note in str(error.value)
    for value in (None, *argument.inert):
        assert refusal(name, value) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("do_train", False), ("do_eval", True), ("push_to_hub", True), ("local_rank", 0),
     ("logging_nan_inf_filter", True), ("hub_strategy", "end"), ("fp16_full_eval", True),
     ("ignore_data_skip", 1)],
)  # fmt: skip
def test_a_value_other_than_what_happens_is_refused(name: str, value: Any):
    with pytest.raises(InputError, match=f"training.{name}"):
        load_recipe(BASE, [(f"training.{name}", value)])


def test_a_field_that_the_table_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(ARGUMENTS, "adam_beta1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"training\.adam_beta1 is newer than this lorakit"):
        load_recipe(BASE, ["training.adam_beta1=0.8"])
