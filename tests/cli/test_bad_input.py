"""Whatever is wrong is one clear line on standard error, exit code 2 (1 while running)."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import Command, Done
from tiny import save_tiny_model


def refused(result: Done, *words: str, code: int = 2) -> None:
    """The command said one line with these words, no traceback, and left with `code`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert result.returncode == code, result.stderr


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def train(lorakit_command: Command, tiny_model: Path, rows: Path, tmp_path: Path) -> Command:
    """`lorakit train` on good input; what is given comes last, so it wins."""

    def run(*arguments: str) -> Done:
        good = {"model": tiny_model, "data.train": rows, "output_dir": tmp_path / "run"}
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = [f"{key}={value}" for key, value in good.items() if key not in given]
        return lorakit_command("train", *defaults, "training.max_steps=1", *arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora.rank=4"], ["lora.rank is not a recipe key"]),
        (["training.learning_rat=1"], ["training.learning_rat", "'learning_rate'"]),
        (["lora.r=0"], ["r must be a whole number of at least 1, not 0"]),
        (["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["model=smollm"], ["there is no alias or folder 'smollm'"]),
        (["model=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["lora.target_modules=[q_porj]"], ["'q_porj' matches no module", "'q_proj'", "down_proj"]),
        (["lora.target_modules=[q_proj, nope]"], ["'nope' matches no module"]),
        (["lora.target_modules=(unclosed"], ["not a regular expression"]),
        (["lora.target_modules=q_proj"], ["for a name give a list: [q_proj]"]),
        (["lora.target_modules=all_linear"], ["did you mean 'all-linear'?"]),
        (["lora.target_modules=[self_attn]"], ["self_attn", "LoRA applies to"]),
        (["training.lr_scheduler_type=cosinus"], ["training", "cosinus"]),
        (["two.yaml", "recipes.yaml"], ["give one recipe, not 2"]),
        (["data.max_length=4"], ["rows.jsonl:1", "data.max_length"]),
        (["data.columns.prompt=question"], ["rows.jsonl:1", "question"]),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_and_nothing_is_written(
    train: Command, tmp_path: Path, arguments: list[str], words: list[str]
):
    refused(train(*arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", ["empty.jsonl"]),
        ("half.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt":', ["half.jsonl:2"]),
        ("odd.jsonl", '{"prompt": "a", "completion": "b"}\n{"x": 1}\n', ["odd.jsonl:2", "x"]),
        ("list.jsonl", "[1]\n", ["list.jsonl:1"]),
        (
            "silent.jsonl",
            '{"messages": [{"role": "user", "content": "hello"}]}\n',
            ["silent.jsonl:1", "assistant"],
        ),
        ("rows.txt", "text", ["rows.txt", ".jsonl"]),
        ("table.csv", "prompt,completion\na\n", ["table.csv:2"]),
        ("fake.parquet", "not parquet", ["fake.parquet"]),
        ("binary.jsonl", "\udcff\udcfe", ["binary.jsonl"]),
    ],
)
def test_a_data_file_that_cannot_be_used_is_named_with_its_line(
    train: Command, tmp_path: Path, name: str, content: str, words: list[str]
):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    refused(train(f"data.train={name}"), *words)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_something_else_is_left_alone(train: Command, tmp_path: Path):
    (tmp_path / "run").mkdir()
    written(tmp_path / "run" / "thesis.txt", "mine")
    refused(train(), "holds something else")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("verb", ["merge", "eval", "chat"])
def test_an_adapter_that_cannot_be_used_is_refused_by_every_verb(
    verb: str,
    lorakit_command: Command,
    tiny_adapter: Path,
    tmp_path: Path,
    rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    more = {"merge": ["-o", "merged"], "eval": ["--data", rows], "chat": []}[verb]

    refused(lorakit_command(verb, "nowhere", *more), "nowhere is not a folder")
    (tmp_path / "bare").mkdir()
    refused(lorakit_command(verb, "bare", *more), "bare holds no adapter")

    cut = shutil.copytree(tiny_adapter, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(lorakit_command(verb, "cut", *more), "adapter_model.safetensors is damaged or cut off")
    weights.write_bytes(os.urandom(2000))
    refused(lorakit_command(verb, "cut", *more), "adapter_model.safetensors is damaged or cut off")

    garbled = shutil.copytree(tiny_adapter, tmp_path / "garbled")
    written(garbled / "adapter_config.json", "{")
    refused(lorakit_command(verb, "garbled", *more), "adapter_config.json is not readable JSON")

    wider = save_tiny_model(tmp_path_factory.mktemp("wider"), hidden_size=64)
    refused(
        lorakit_command(verb, tiny_adapter, *more, "--base", wider),
        "adapter for another base model",
        *("_proj", "(32, ", "(64, "),
    )
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_names_no_base_asks_for_one(
    lorakit_command: Command, tiny_adapter: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    written(folder / "adapter_config.json", json.dumps(config | {"base_model_name_or_path": None}))
    refused(lorakit_command("merge", "adapter", "-o", "merged"), "give --base")


def test_a_merge_into_a_folder_that_is_there_is_refused_before_anything_is_loaded(
    lorakit_command: Command, tiny_adapter: Path, tmp_path: Path
):
    (tmp_path / "merged").mkdir()
    written(tmp_path / "merged" / "x", "mine")
    refused(lorakit_command("merge", tiny_adapter, "-o", "merged"), "merged already exists")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["No such command 'trian'", "train"]),
        (["train", "--modle", "x"], ["--modle", "--model"]),
        (["train"], ["model is missing", "output_dir is missing"]),
        (["eval", "adapter"], ["--data"]),
        (["eval", "adapter", "--data", "x", "--limit", "0"], ["--limit"]),
        (["merge", "adapter"], ["--output"]),
    ],
)
def test_a_wrong_command_line_is_one_line_too(
    lorakit_command: Command, arguments: list[str], words: list[str]
):
    refused(lorakit_command(*arguments), *words)


def test_an_unknown_metric_is_named_with_the_nearest(lorakit_command: Command, tiny_adapter: Path):
    result = lorakit_command("eval", tiny_adapter, "--data", "x", "--metrics", "blue")
    refused(result, "'blue'", "'bleu'")


def test_a_process_says_it_in_one_line_too_and_shows_the_traceback_with_debug(
    lorakit_process: Command,
):
    refused(lorakit_process("train", "nowhere.yaml"), "nowhere.yaml")
    result = lorakit_process("train", "nowhere.yaml", "--debug")
    assert "Traceback" in result.stderr
    assert result.returncode == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_while_training_is_said_and_leaves_no_half_checkpoint(
    train: Command, small_disk: Path
):
    result = train(f"output_dir={small_disk / 'run'}", "lora.r=32", "training.save_steps=1")
    refused(result, "cannot write", str(small_disk), code=1)
    assert {path.name for path in (small_disk / "run").iterdir()} <= {
        "lorakit-run.json",
        "metrics.jsonl",
        "monitor.jsonl",
    }


def test_a_full_disk_while_merging_is_said_and_leaves_nothing(
    lorakit_command: Command, tiny_adapter: Path, small_disk: Path
):
    (small_disk / "ballast").write_bytes(b"0" * 350_000)
    result = lorakit_command("merge", tiny_adapter, "-o", small_disk / "merged")
    refused(result, "cannot write", str(small_disk / "merged"), code=1)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
