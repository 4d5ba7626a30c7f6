"""Two processes over gloo give what one gives: DDP and FSDP2, by torchrun and by accelerate."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_runs import cut_back, in_two_processes

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.errors import InputError
from lorakit.training.processes import process_count
from lorakit.training.recipe import load_recipe
from matrix import few
from small_runs import save_sums

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = (
    *("accelerate.commands.accelerate_cli", "launch", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2"),
)
FSDP = {"fsdp": True}
BEST = {
    "max_steps": 12,
    "learning_rate": 0.1,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_total_limit": 1,
}
RARE = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.up_proj.weight"],
    "trainable_token_indices": [5, 6, 7],
}
# What one process and two must agree on: keys of `lora` and of `training`.
AGREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp_best": ({}, BEST | {"ddp_backend": "gloo"}),
    "fsdp_best": ({}, BEST | FSDP),
    "fsdp_full_shard": ({}, {"fsdp": "full_shard auto_wrap"}),
    "fsdp_dora": ({"use_dora": True, "modules_to_save": ["lm_head"]}, FSDP),
    "fsdp_embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, FSDP),
    "fsdp_rare": (RARE, FSDP),
    "fsdp_pissa": ({"init_lora_weights": "pissa"}, FSDP),
    "fsdp_clipped": (
        {},
        {
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.01,
            "fsdp_config": {"activation_checkpointing": True},
        }
        | FSDP,
    ),
}
USUAL = ("fsdp_clipped",)
"""Those that every change trains."""
GRPO = {
    "type": "grpo",
    "rewards": [{"type": "length", "target": 6, "unit": "characters"}],
    "num_generations": 4,
    "max_completion_length": 8,
    "scale_rewards": "batch",
    "beta": 0.1,
}
GENERATE = {"rows": 4, "metrics": ["exact_match", "rouge"], "max_new_tokens": 6}
# The same of what else a recipe says, and of `training`.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp_generates": ({"eval": {"generate": GENERATE}}, {"eval_strategy": "steps"}),
    "ddp_continues": ({"adapter": {"path": "start", "mode": "continue"}}, {}),
    "fsdp_continues": ({"adapter": {"path": "start", "mode": "continue"}}, FSDP),
    "ddp_grpo": ({"objective": GRPO}, {"eval_strategy": "steps", "eval_steps": 2}),
    "ddp_on_top": ({"adapter": {"path": "start", "mode": "freeze"}}, {}),
    "fsdp_on_top": ({"adapter": {"path": "start", "mode": "freeze"}, "objective": "dpo"}, FSDP),
}

USUAL_CHANGES = ("ddp_grpo",)


def recipe(
    model: Path, rows: Path, output: Path, processes: int, lora: Any = (), **training: Any
) -> dict[str, Any]:
    """Eight rows a step, however many processes; spread only over several.

    Which prefixes a batch shares, and so how sums round, depends on how a step is divided.
    """
    training = {
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_steps": 2,
    } | training
    rest = training.get("gradient_accumulation_steps", 1) * processes
    training["per_device_train_batch_size"] = 8 // rest
    if processes == 1:
        training = {k: v for k, v in training.items() if not k.startswith("fsdp")}
    return {
        "model": str(model),
        "dtype": "float64",
        "data": {"train": str(rows), "eval": 0.25, "share_prefixes": False},
        "lora": {"r": 4, "lora_alpha": 8, **dict(lora)},
        "training": training,
        "output_dir": str(output),
    }


def changed(name: str, model: Path, folder: Path, output: Path, processes: int) -> dict[str, Any]:
    """The recipe of one of `CHANGES`, whose files are in `folder`."""
    changes, training = CHANGES[name]
    rows = folder / ("pairs.jsonl" if changes.get("objective") == "dpo" else "rows.jsonl")
    values = recipe(model, rows, output, processes, **training) | changes
    if (start := changes.get("adapter")) is not None:
        values["adapter"] = start | {"path": str(folder / start["path"])}
    return values


def launched(launcher: tuple[str, ...], *command: str | Path) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", *launcher, *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def losses(folder: Path) -> list[list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "loss", "eval_loss", "grad_norm")
    # Warnings of what an adapter learned are those of runs whose weights are in one process.
    curves = (line for line in lines if "warning" not in line)
    return [[line[key] for key in keys if key in line] for line in curves]


def assert_same_run(one: Path, two: Path, close: float = 1e-9) -> None:
    """The same curve and record but for rounding, the same files, and every tensor."""
    files = [{p.name for p in folder.iterdir()} for folder in (one, two)]
    # Where weights are spread, no process can measure an adapter or answer alone.
    assert files[0] - files[1] <= {"monitor.jsonl", "samples.json"}
    assert files[1] <= files[0]
    first, second = losses(one), losses(two)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # Trainer logs float32
    records = read_manifest(one), read_manifest(two)
    assert records[0] is not None
    assert records[1] is not None
    for key in ("eval_loss", "base_eval_loss"):
        values = [getattr(record, key) for record in records]
        assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert (records[0].eval_scores or {}) == pytest.approx(records[1].eval_scores or {}, rel=1e-6)
    assert records[0].stands_on == records[1].stands_on
    for key in ("train_tokens", "supervised_tokens", "steps", "base_fingerprint"):
        assert getattr(records[0], key) == getattr(records[1], key), key
    tensors = load_file(two / "adapter_model.safetensors")
    wanted = load_file(one / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (tensor - tensors[name]).abs().max() < close, name


@pytest.mark.exhaustive
@pytest.mark.parametrize(("launcher", "name"), [(TORCHRUN, "ddp"), (ACCELERATE, "fsdp")])
def test_the_command_gives_the_same_run_in_two_processes_as_in_one(
    launcher: tuple[str, ...], name: str, tiny_model: Path, rows: Path, tmp_path: Path
):
    one, two = tmp_path / "one", tmp_path / name
    values = recipe(tiny_model, rows, one, 1), recipe(tiny_model, rows, two, 2)
    for own in values:
        own["data"]["share_prefixes"] = True
    lorakit.train(values[0], quiet=True)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values[1]))
    done = launched(launcher, "-m", "lorakit", "train", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter: ") == 1
    assert done.stderr.count("held out (") == 1
    assert_same_run(one, two, close=1e-7)
    assert ("own logits" in done.stderr) == (name == "fsdp"), "what is sharded shows in this notice"
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        names = {path.name for path in (two / checkpoint).iterdir()}
        assert {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= names
        assert not any("pytorch_model" in name for name in names), "the base is not saved"


@pytest.fixture(scope="module")
def several(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder with what two processes trained in one launch, and the rows."""
    everything = "not exhaustive" not in request.config.option.markexpr
    folder = tmp_path_factory.mktemp("several")
    rows = save_sums(folder / "rows.jsonl")
    single = folder / "single.jsonl"
    single.write_text(rows.read_text().splitlines()[0] + "\n")

    def two(name: str, lora: Any = (), data: Path = rows, **training: Any) -> dict[str, Any]:
        return recipe(tiny_model, data, folder / name, 2, lora, **training)

    drops = {"lora_dropout": 0.1}
    runs: list[tuple[dict[str, Any], str | None]] = [
        *(
            (two(name, lora, **training), None)
            for name, (lora, training) in AGREE.items()
            if everything or name in USUAL
        ),
        (two("ddp_undisturbed", drops), None),
        (two("ddp_killed", drops), "ddp_undisturbed"),
        (two("biases", {"bias": "all"}, **FSDP), None),
        (two("replicated", {"layer_replication": [[0, 2], [0, 2]]}, **FSDP), None),
        (two("first_version", fsdp=True, fsdp_config={"version": 1}), None),
    ]
    one_row = two("one_row", data=single)
    one_row["data"]["eval"] = 0
    packed = two("packed", max_steps=3, num_train_epochs=3, gradient_accumulation_steps=48)
    packed["data"] |= {"eval": 0, "packing": True, "max_length": 100}
    packed["training"]["per_device_train_batch_size"] = 4
    runs.append((one_row, None))
    if everything:
        pairs = [
            {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "No" + "." * n}
            for n in range(16)
        ]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / "pairs.jsonl").write_text(text)
        lorakit.train(recipe(tiny_model, rows, folder / "start", 1), quiet=True)
    chosen = CHANGES if everything else USUAL_CHANGES
    runs += [(changed(name, tiny_model, folder, folder / name, 2), None) for name in chosen]
    if everything:
        runs.append((packed, None))
        runs.append((two("fsdp_undisturbed", drops, **FSDP), None))
        runs.append((two("fsdp_killed", drops, **FSDP), "fsdp_undisturbed"))
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    in_two_processes(listed)
    return folder, rows


@pytest.mark.parametrize("name", few(list(AGREE), *USUAL))
def test_whatever_is_trained_two_processes_give_what_one_gives(
    name: str, several: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    folder, rows = several
    lora, training = AGREE[name]
    values = recipe(tiny_model, rows, tmp_path / "one", 1, lora, **training)
    lorakit.train(values, quiet=True)
    assert_same_run(tmp_path / "one", folder / name)


@pytest.mark.parametrize("name", few(list(CHANGES), *USUAL_CHANGES))
def test_stages_and_generated_answers_are_those_of_one_process(
    name: str, several: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    folder, _ = several
    lorakit.train(changed(name, tiny_model, folder, tmp_path / "one", 1), quiet=True)
    assert_same_run(tmp_path / "one", folder / name)
    assert max(loss[-1] for loss in losses(folder / name)) > 0, "there is something to learn"


@pytest.mark.exhaustive
def test_two_processes_make_a_step_of_packed_rows_that_is_that_of_all_rows(
    several: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    folder, rows = several
    values = recipe(tiny_model, rows, tmp_path / "one", 1, max_steps=3, num_train_epochs=3)
    values["data"]["eval"] = 0
    values["training"]["per_device_train_batch_size"] = 48
    lorakit.train(values, quiet=True)
    one, two = (f / "adapter_model.safetensors" for f in (tmp_path / "one", folder / "packed"))
    tensors = load_file(two)
    for name, tensor in load_file(one).items():
        assert (tensor - tensors[name]).abs().max() < 1e-9, name
    records = read_manifest(tmp_path / "one"), read_manifest(folder / "packed")
    assert records[0] is not None
    assert records[1] is not None
    assert records[0].train_tokens == records[1].train_tokens, "those of both processes"


@pytest.mark.exhaustive
def test_two_processes_learn_preferences_as_one_does(tiny_model: Path, tmp_path: Path):
    pairs = [
        {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "No" + "." * n}
        for n in range(16)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    runs = []
    for objective, shares in (("dpo", {}), ("kto", {}), ("kto", FSDP)):
        one, two = (tmp_path / f"{objective}{len(shares)}{n}" for n in (1, 2))
        own = [recipe(tiny_model, path, f, n, **shares) for n, f in ((1, one), (2, two))]
        for values in own:
            values["objective"] = objective
        lorakit.train(own[0], quiet=True)
        runs.append((own[1], None))
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps(runs))
    in_two_processes(listed)
    for name in ("dpo0", "kto0", "kto1"):
        assert_same_run(tmp_path / f"{name}1", tmp_path / f"{name}2")


@pytest.mark.exhaustive
def test_two_processes_distill_as_one_does(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + {n}?", "completion": f"It is {2 * n}."} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for name, lmbda, shares in (("sampled", 0.5, {}), ("given", 0.0, FSDP)):
        own = [recipe(tiny_model, path, tmp_path / f"{name}{n}", n, **shares) for n in (1, 2)]
        for values in own:
            values["objective"] = {"type": "distill", "system": "Shout.", "lmbda": lmbda}
            values["objective"]["max_new_tokens"] = 6
        lorakit.train(own[0], quiet=True)
        runs.append((own[1], None))
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps(runs))
    in_two_processes(listed)
    for name in ("sampled", "given"):
        assert_same_run(tmp_path / f"{name}1", tmp_path / f"{name}2")


@pytest.mark.parametrize("how", few(["ddp", "fsdp"], "ddp"))
def test_two_killed_processes_resume_to_the_bytes_of_undisturbed_ones(
    how: str, several: tuple[Path, Path]
):
    folder, _ = several
    first, second = folder / f"{how}_undisturbed", folder / f"{how}_killed"
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "checkpoint-2" / name).read_bytes() != (first / name).read_bytes()
    assert losses(first) == losses(second)


def test_what_cannot_be_sharded_or_divided_is_refused_in_one_line(several: tuple[Path, Path]):
    refused = dict(
        line.split(": ", 1) for line in (several[0] / "refused.txt").read_text().splitlines()
    )
    assert refused.keys() == {"biases", "replicated", "first_version", "one_row"}
    assert "lora.bias: 'all' cannot be trained with FSDP" in refused["biases"]
    assert "lora.layer_replication" in refused["replicated"]
    assert "set version: 2 in training.fsdp_config" in refused["first_version"]
    assert "1 rows cannot be divided over 2 processes" in refused["one_row"]


def test_a_run_of_two_processes_does_not_go_on_with_one(
    several: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    folder, rows = several
    cut_back(folder / "ddp_undisturbed", tmp_path / "run")
    values = recipe(tiny_model, rows, tmp_path / "run", 2, {"lora_dropout": 0.1})
    with pytest.raises(InputError, match="processes was 2 and is 1"):
        lorakit.train(values, resume=True, quiet=True)


@pytest.mark.exhaustive
def test_a_checkpoint_of_two_sharded_processes_has_the_optimiser_of_one(
    several: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    folder, rows = several
    lorakit.train(recipe(tiny_model, rows, tmp_path / "one", 1), quiet=True)
    one, two = (
        torch.load(f / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for f in (tmp_path / "one", folder / "fsdp_full_shard")
    )
    assert one.keys() == two.keys()
    for index, state in one.items():
        for key, value in state.items():
            assert torch.allclose(value, two[index][key], rtol=1e-6, atol=1e-12), (index, key)


@pytest.mark.exhaustive
def test_what_is_wrong_for_all_processes_is_said_once(tiny_model: Path, rows: Path, tmp_path: Path):
    rows.write_text(rows.read_text() + "[1]\n")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(tiny_model, rows, tmp_path / "run", 2)))
    done = launched(TORCHRUN, "-m", "lorakit", "train", path)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert "rows.jsonl:49" in said[0]
    assert "exitcode  : 2" in done.stderr, "of a process; torchrun's own is always 1"
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


def test_an_environment_of_several_processes_without_a_meeting_place_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"without RANK, .*MASTER_ADDR.*torchrun.*WORLD_SIZE"):
        process_count()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE is 'many'"):
        process_count()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert process_count() == 1


def test_fsdp_in_one_process_and_its_settings_without_it_are_refused(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", 2, fsdp=True)
    with pytest.raises(InputError, match="this is one: start it with torchrun"):
        lorakit.train(values, quiet=True)
    values["training"] |= {"fsdp": False, "fsdp_config": {"version": 2}}
    with pytest.raises(InputError, match=r"with training.fsdp: true alone"):
        lorakit.train(values, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_deepspeed_configuration_is_handed_on_and_needs_deepspeed(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    values = recipe(tiny_model, rows, tmp_path / "run", 2, deepspeed=config)
    assert load_recipe(values).training.model_dump()["deepspeed"] == config
    if find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    with pytest.raises(InputError, match="pip install deepspeed"):
        lorakit.train(values, quiet=True)
    assert not (tmp_path / "run").exists()
