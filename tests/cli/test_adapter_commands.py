"""inspect, combine, resize, extract and diff, run as a person would."""

import json
from pathlib import Path

from command import Command
from random_adapters import make_adapter


def test_the_verbs_over_adapters_show_what_they_did(
    lorakit_command: Command, tiny_model: Path, tiny_adapter: Path, rows: Path, tmp_path: Path
):
    other = make_adapter(tiny_model, tmp_path / "other", seed=1)
    done = lorakit_command(
        "combine", tiny_adapter, other, "--weights", "1,-0.5", "--method", "svd", "-o", "both"
    )
    assert done.returncode == 0, done.stderr
    assert "of ‖ΔW‖² is lost" in done.stdout
    done = lorakit_command("inspect", "both", "--base", tiny_model, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["made_by"].endswith("(combine)")
    assert found["fit"]["fits"]
    assert "fits" in lorakit_command("inspect", "both", "--base", tiny_model).stdout
    done = lorakit_command(
        "resize", "both", "--energy", "0.9", "-o", "small", "--data", rows, "--limit", "4"
    )
    assert done.returncode == 0, done.stderr
    assert "loss over 4 rows:" in done.stdout
    options = ("--data", rows, "--limit", "3", "--max-new-tokens", "4")
    done = lorakit_command("diff", tiny_adapter, "small", *options)
    assert done.returncode == 0, done.stderr
    assert "of 3 answers differ" in done.stdout
    done = lorakit_command("diff", tiny_adapter, "small", *options, "--json")
    assert json.loads(done.stdout)["answers"]["prompts"] == 3
    assert lorakit_command("eval", "both", "--data", rows, "--metrics", "loss").returncode == 0
    merged = lorakit_command("merge", "both", "-o", "merged")
    assert merged.returncode == 0, merged.stderr
    done = lorakit_command("extract", tiny_model, "merged", "-o", "again", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "extracted: again (14 modules" in done.stdout


def test_what_cannot_be_is_one_line_and_nothing_is_written(
    lorakit_command: Command, tiny_model: Path, tiny_adapter: Path, rows: Path, tmp_path: Path
):
    before = sorted(tmp_path.iterdir())
    for said, arguments in {
        "holds no adapter": ("inspect", tiny_model),
        "must be comma-separated numbers": (
            "combine",
            tiny_adapter,
            "--weights",
            "a,b",
            "-o",
            "out",
        ),
        "1 adapters and 2 weights": ("combine", tiny_adapter, "--weights", "1,2", "-o", "out"),
        "did you mean 'ties'": (
            *("combine", tiny_adapter, "--weights", "1", "--method", "tie", "-o", "out"),
        ),
        "at least 1": ("resize", tiny_adapter, "--rank", "0", "-o", "out"),
        "for --data": ("resize", tiny_adapter, "--rank", "2", "--limit", "1", "-o", "out"),
        "nowhere.jsonl": (
            *("resize", tiny_adapter, "--rank", "2", "--data", "nowhere.jsonl", "-o", "out"),
        ),
        "nothing to extract": ("extract", tiny_model, tiny_model, "-o", "out"),
        f"{tiny_model} holds no adapter": ("diff", tiny_adapter, tiny_model),
    }.items():
        done = lorakit_command(*arguments)
        assert done.returncode == 2, arguments
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert sorted(tmp_path.iterdir()) == before
