"""A recorded run is made again and compared; what is not as it was is said."""

import json
from pathlib import Path

import pytest

import lorakit
from lorakit.errors import InputError
from lorakit.training.reproduce import reproduce
from small_runs import recipe


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
    record["recipe"]["training"]["learning_rate"] = 0.3
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
    with pytest.raises(InputError, match="behind step 6: no one recipe makes it again"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_changed_data_and_a_folder_without_a_record_are_refused(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    lorakit.train(recipe(tiny_model, rows, tmp_path / "run"), quiet=True)
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"not those that were learned.*sha256"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    (tmp_path / "run" / "lorakit.json").unlink()
    with pytest.raises(InputError, match="only what lorakit trained"):
        reproduce(tmp_path / "run", tmp_path / "again", quiet=True)
