"""A recorded run is made again and compared; what is not as it was is said."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import lorakit
from lorakit.data.template_clock import Rendering, StandingClock, at
from lorakit.data.templates import render
from lorakit.errors import InputError
from lorakit.models.template_files import digest, write_templates
from lorakit.training.reproduce import reproduce
from small_runs import recipe
from tiny import CHATML


def test_a_run_is_reproduced_to_the_bit(tiny_model: Path, rows: Path, tmp_path: Path):
    values = recipe(tiny_model, rows, tmp_path / "run")
    values["lora"]["lora_dropout"] = 0.1
    lorakit.train(values, quiet=True)
    result = reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert result.identical
    assert result.reproduced
    assert (result.largest_difference, result.changed) == (0, [])
    assert result.losses["adapter"][0] == result.losses["adapter"][1]


def test_another_adapter_than_the_recorded_one_is_not_reproduced(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    lorakit.train(recipe(tiny_model, rows, tmp_path / "run"), quiet=True)
    path = tmp_path / "run" / "lorakit.json"
    record = json.loads(path.read_text())
    record["recipe"]["training"]["learning_rate"] = 1e-6
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    result = reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert not result.identical
    assert not result.reproduced
    assert result.largest_difference > 0
    assert [line for line in result.changed if line.startswith("torch was 1.0 and is ")]


def test_a_run_that_went_on_with_other_values_says_so_and_is_not_made_again(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = recipe(tiny_model, rows, tmp_path / "run")
    lorakit.train(first, quiet=True)
    longer = recipe(tiny_model, rows, tmp_path / "run", max_steps=9)
    with pytest.raises(InputError, match=r"max_steps was 6 and is 9.*--continue"):
        lorakit.train(longer, resume=True, quiet=True)

    # Stopped behind its last checkpoint, it is neither the old run nor finished.
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.training.run.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            lorakit.train(longer, resume=True, accept_changes=True, quiet=True)
    with pytest.raises(InputError, match=r"max_steps was 9 and is 6"):
        lorakit.train(first, resume=True, quiet=True)

    result = lorakit.train(longer, resume=True, quiet=True)
    [went_on] = result.manifest.continued
    assert went_on["step"] == 6
    assert "training.max_steps was 6 and is 9" in went_on["changes"]
    with pytest.raises(InputError, match="after step 6: no single recipe reproduces it"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_changed_data_and_a_folder_without_a_record_are_refused(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    lorakit.train(recipe(tiny_model, rows, tmp_path / "run"), quiet=True)
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"data differ from those of the run.*sha256"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    (tmp_path / "run" / "lorakit.json").unlink()
    with pytest.raises(InputError, match="only what lorakit trained"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)


DATED = CHATML.replace("{% for", "Today is {{ strftime_now('%Y-%m-%d') }}.\n{% for", 1)


def with_template(model: Path, folder: Path, template: str) -> Path:
    copy = Path(shutil.copytree(model, folder))
    write_templates(copy, template)
    return copy


def test_rows_with_a_date_are_made_again_with_that_date(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    dated = with_template(tiny_model, tmp_path / "dated", DATED)
    then = Rendering(time=datetime(2020, 2, 3, 4, 5, 6))
    first = lorakit.train(recipe(dated, rows, tmp_path / "run"), rendering=then, quiet=True)
    assert first.manifest.template_time == "2020-02-03T04:05:06"
    assert [line for line in first.manifest.notices if "2020-02-03" in line]
    result = reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert result.identical
    assert result.changed == []
    assert result.after.template_time == first.manifest.template_time

    # An older record does not say when it was: other rows, and the reason is named.
    path = tmp_path / "run" / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template_time": None}))
    result = reproduce(tmp_path / "run", tmp_path / "now", quiet=True)
    assert not result.identical
    assert [line for line in result.changed if "writes the date" in line]


def test_a_run_is_made_again_with_its_own_template_when_the_base_has_another(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    base = with_template(tiny_model, tmp_path / "base", CHATML)
    lorakit.train(recipe(base, rows, tmp_path / "run"), quiet=True)
    newer = CHATML.replace("{% for", "Be brief.\n{% for", 1)
    write_templates(base, newer)
    result = reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert result.identical
    [said] = result.changed
    assert digest(CHATML)[:12] in said
    assert digest(newer)[:12] in said
    (tmp_path / "run" / "chat_template.jinja").unlink()
    result = reproduce(tmp_path / "run", tmp_path / "other", quiet=True)
    assert not result.identical
    assert [line for line in result.changed if digest(newer)[:12] in line]


@pytest.mark.parametrize(
    ("template", "is_read"),
    [
        (CHATML, False),
        (CHATML + "{# strftime_now #}", False),
        ("{{ 'strftime_now' if false }}" + CHATML, False),
        ("{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHATML, False),
        (DATED, True),
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
         "{% endif %}Today Date: {{ date_string }}\n" + CHATML, True),
        ("{% set clock = strftime_now %}{{ clock('%H') }}" + CHATML, True),
    ],
)  # fmt: skip
def test_a_clock_is_told_by_reading_it_and_not_by_its_name(
    tiny_model: Path, template: str, is_read: bool
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    clock = StandingClock(datetime(2020, 2, 3))
    message = {"role": "user", "content": "Which day?"}
    with at(clock):
        text = render([message], tokenizer)
    assert clock.was_read is is_read
    assert "Which day?" in text
    assert ("2020" in text) is (is_read and "%Y" in template)
    assert render([message], tokenizer) != text or not is_read or "%Y" not in template


def test_a_template_that_draws_is_named_in_check_and_when_run_again(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    drawing = CHATML.replace("{% for", "{{ ['a', 'a'] | random }}{% for", 1)
    base = with_template(tiny_model, tmp_path / "base", drawing)
    result = lorakit.train(recipe(base, rows, tmp_path / "run", max_steps=1), quiet=True)
    assert [line for line in result.manifest.notices if "draws at random" in line]
    again = reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert [line for line in again.changed if "draws at random" in line]


def test_a_date_that_no_row_shows_is_no_date_of_the_run(tiny_model: Path, tmp_path: Path):
    default = "{% set today = strftime_now('%Y-%m-%d') %}" + CHATML.replace(
        "{% for", "{% if messages[0].role != 'system' %}Today is {{ today }}.\n{% endif %}{% for", 1
    )
    base = with_template(tiny_model, tmp_path / "base", default)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    system = [{"role": "system", "content": "Be brief."}]
    for name, before, is_dated in (("with", system, False), ("without", [], True)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"messages": before + turns}) + "\n" for _ in range(8)))
        values = recipe(base, rows, tmp_path / name, max_steps=1)
        values["data"]["eval"] = 0
        manifest = lorakit.train(values, quiet=True).manifest
        assert (manifest.template_time is not None) is is_dated
        assert any("writes the date" in line for line in manifest.notices) is is_dated
