"""Whatever is wrong with data or a recipe is one line that says where and what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from malformed import RECIPE, Case, data_cases, recipe_cases

from command import run_lorakit
from lorakit.data.dataset import PreparedData, prepare
from lorakit.errors import InputError
from lorakit.training.recipe import load_recipe
from tiny import byte_tokenizer

DATA, RECIPES = list(data_cases()), list(recipe_cases())

CURE = re.compile(
    r"expected|did you mean|should|must|only|is missing|known are|accepted are|"
    r"\b(give|write|save|fill|drop|remove|repair|correct|rename|name|check|convert|quote|raise|"
    r"shorten|wrap|add|use|leave|put|flatten|pack|pip install|it has|has one object a line|fit)\b"
)


def prepared(section: Any) -> PreparedData:
    """What the command does with a recipe's data, but for the model."""
    given = section if isinstance(section, dict) else {"train": section}
    recipe = load_recipe({**RECIPE, "data": {"eval": 0, **given}})
    return prepare(
        byte_tokenizer(),
        recipe.data.train,
        recipe.data.eval,
        max_length=recipe.data.max_length,
        columns=recipe.data.columns or None,
        limit=recipe.data.limit,
        seed=recipe.training.seed,
    )


def check(message: str, case: Case) -> None:
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 6000
    assert [word for word in case.words if word not in message] == []


def test_there_are_more_than_two_hundred_and_no_name_stands_twice() -> None:
    names = [case.name for case in (*DATA, *RECIPES)]
    assert len(names) == len(set(names)) > 200


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in DATA if not c.accepted])
def test_malformed_data_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    section = case.write(tmp_path)
    with pytest.raises(InputError) as caught:
        prepared(section)
    check(str(caught.value), case)
    assert CURE.search(str(caught.value))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in DATA if c.accepted])
def test_odd_data_is_taken_with_a_notice(case: Case, tmp_path: Path) -> None:
    data = prepared(case.write(tmp_path))
    assert data.train
    said = [*data.notices, *(finding.line for finding in data.findings if finding.count)]
    check(next((line for line in said if case.words[0] in line), f"{said}"), case)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in RECIPES])
def test_a_malformed_recipe_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    given = case.write(tmp_path)
    arguments = [given] if isinstance(given, Path) else [RECIPE, [given]]
    with pytest.raises(InputError) as caught:
        load_recipe(*arguments)
    check(str(caught.value), case)
    assert CURE.search(str(caught.value))


FEW = {"jsonl with latin-1", "a zip bomb in rows.jsonl.gz", "a pipe", "tool_calls: no name"}
FEW_RECIPES = {"a recipe of a billion keys by merging", "data.train=[{path: a, wieght: 2}]"}


def refused(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert [word for word in words if word not in last] == []


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in DATA if c.name in FEW])
def test_the_command_says_the_same_of_data_and_leaves_with_2(
    case: Case, tiny_model: Path, tmp_path: Path
) -> None:
    given = ("--model", tiny_model, "--data", case.write(tmp_path), "--output-dir", "run")
    refused(run_lorakit(tmp_path, "train", *given), *case.words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name) for c in RECIPES if c.name in FEW_RECIPES]
)
def test_the_command_says_the_same_of_a_recipe_and_leaves_with_2(
    case: Case, tmp_path: Path
) -> None:
    given = case.write(tmp_path)
    whole = ["model=m", "data.train=rows.jsonl", "output_dir=run"]
    refused(run_lorakit(tmp_path, "train", *whole, str(given)), *case.words)


def test_an_override_may_be_longer_than_any_file_name(tmp_path: Path) -> None:
    """Looking whether an argument is a recipe's file must not fail on it."""
    sources = ", ".join(f"rows-{i}.jsonl" for i in range(100))
    arguments = ["model=m", f"data.train=[{sources}]", "output_dir=run", "data.limit=0"]
    refused(run_lorakit(tmp_path, "train", *arguments), "data.limit")
