"""Runs of dpo, kto and their like: the same whatever the batches, resumed, swept, evaluated."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lorakit
from command import run_lorakit
from lorakit.errors import InputError
from lorakit.training.recipe import load_recipe
from small_runs import lines, recipe, weights

PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know" + "." * n}
    for n in range(12)
]
JUDGED = [
    {"prompt": p["prompt"], "completion": p["chosen" if n % 2 else "rejected"], "label": n % 2}
    for n, p in enumerate(PAIRS)
]
ROWS = {"kto": JUDGED}
SGD = {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 1}


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Any:
    """Makes a recipe of two steps of nine rows each in float64."""

    def made(name: str, objective: Any, data: Any = (), **training: Any) -> dict[str, Any]:
        kind = objective if isinstance(objective, str) else objective["type"]
        rows = tmp_path / f"{kind}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS.get(kind, PAIRS)))
        size = training.get("gradient_accumulation_steps", 1)
        settings = {"max_steps": 2, "per_device_train_batch_size": 9 // size} | SGD | training
        values = recipe(tiny_model, rows, tmp_path / name, **settings)
        values["data"] |= dict(data)
        return values | {"objective": objective, "dtype": "float64"}

    return made


def assert_same_weights(folders: list[Path]) -> None:
    first, *others = map(weights, folders)
    assert any("lora_B" in name and tensor.abs().max() > 1e-4 for name, tensor in first.items())
    for other in others:
        for name, tensor in first.items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.exhaustive)])
def test_the_reference_and_the_batches_do_not_change_a_step(kind: str, make: Any):
    variants: list[tuple[Any, Any, Any]] = [
        ({"precompute_ref_log_probs": False}, {}, {}),
        ({"precompute_ref_log_probs": True}, {}, {"gradient_accumulation_steps": 3}),
        (
            {"precompute_ref_log_probs": False},
            {"padding_free": False},
            {"gradient_accumulation_steps": 9, "gradient_checkpointing": True},
        ),
        ({}, {"packing": True, "max_length": 400}, {"per_device_train_batch_size": 9}),
    ]
    found = []
    for i, (settings, data, training) in enumerate(variants):
        values = make(f"run{i}", {"type": kind, **settings}, data, **training)
        result = lorakit.train(values, quiet=True)
        found.append(result.output_dir)
        scores = result.manifest.base_eval_scores
        assert scores is not None
        assert scores["accuracy"] == 0.5, "no answer is preferred before training"
        assert scores["margin"] == 0
        base = {"dpo": math.log(2), "kto": 0.5}[kind]
        assert result.manifest.base_eval_loss == pytest.approx(base, abs=1e-12)
        logged = [line for line in lines(result.output_dir / "metrics.jsonl") if "margin" in line]
        assert logged[0]["margin"] == pytest.approx(0, abs=1e-9)
        assert logged[-1]["margin"] > 0
        assert {"rewards/chosen", "rewards/rejected", "logps/chosen"} <= logged[-1].keys()
    assert_same_weights(found)


def test_a_sweep_trains_each_configuration_with_its_own_settings(make: Any, tmp_path: Path):
    values = make("swept", "dpo")
    values["data"]["eval"] = 0.5
    rows = [{**PAIRS[n % 12], "prompt": f"{n}?"} for n in range(40)]
    found = lorakit.sweep(values, over={"objective.beta": [0.1, 0.7]}, data=rows, quiet=True)
    folders = {one["changes"]["objective.beta"]: Path(one["folder"]) for one in found}
    for beta, folder in folders.items():
        record = json.loads((folder / "lorakit.json").read_text())
        assert record["recipe"]["objective"]["beta"] == beta
    tensors = [weights(folder) for folder in folders.values()]
    assert any((a - tensors[1][name]).abs().max() > 1e-6 for name, a in tensors[0].items())
    own = values | {"objective": {"type": "dpo", "beta": 0.7}, "output_dir": str(tmp_path / "own")}
    result = lorakit.train(own, data=rows, quiet=True)
    assert_same_weights([result.output_dir, folders[0.7]])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_that_has_stopped_resumes_to_the_same_bytes(kind: str, make: Any, tmp_path: Path):
    values = make("run", kind, max_steps=4, save_steps=2, per_device_train_batch_size=3)
    values["lora"]["lora_dropout"] = 0.1
    lorakit.train(values, quiet=True)
    folder = tmp_path / "run"
    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    for file in (folder / "checkpoint-4").iterdir():
        file.unlink()
    lorakit.train(values, resume=True, quiet=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
def test_eval_scores_an_adapter_on_rows_beside_its_base(kind: str, make: Any, tmp_path: Path):
    result = lorakit.train(make("run", kind, max_steps=4), quiet=True)
    rows, found = tmp_path / f"{kind}.jsonl", tmp_path / "scores.json"
    done = run_lorakit(
        tmp_path,
        *("eval", "run", f"--data={rows}", "--metrics=loss", f"--json={found}", "--batch-size=5"),
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(found.read_text())["scores"]
    assert scores["loss"]["tuned"] < scores["loss"]["base"]
    assert scores["margin"]["tuned"] > scores["margin"]["base"]
    assert scores["logps/chosen"]["base"] < 0
    assert result.manifest.eval_scores is not None
    assert result.manifest.eval_scores.keys() <= scores.keys()


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"type": "dpo", "loss_type": "sigmod"}, "loss_type"),
        ({"type": "dpo", "loss_type": ["sigmoid", "sigmoid"]}, "loss_type"),
        ({"type": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"type": "dpo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"type": "dpo", "loss_type": "exo_pair"}, "exo_pair"),
        ({"type": "dpo", "beta": 0}, "beta"),
        ({"type": "dpo", "ld_alpha": 1.5}, "ld_alpha"),
        ({"type": "simpo", "gamma": 1}, "simpo_gamma"),
        ({"type": "kto", "loss_type": "sigmoid"}, "loss_type"),
        ({"type": "dpo", "loss_type": "kto_pair"}, "objective: kto"),
        (
            {"type": "dpo", "loss_type": "apo_down", "f_divergence_type": "js_divergence"},
            r"^recipe: objective.f_divergence_type js_divergence has no meaning with loss_type apo",
        ),
        ({"type": "dpo", "discopop_tau": 0.1}, "loss_type discopop alone"),
        ({"type": "dpo", "f_alpha_divergence_coef": 2}, "f_divergence_type=alpha_divergence"),
        ({"type": "orpo", "orpo_beta": 0.1}, "use beta"),
    ],
)
def test_settings_that_cannot_be_used_are_named(objective: dict[str, Any], named: str, make: Any):
    with pytest.raises(InputError, match=named):
        lorakit.train(make("run", objective), quiet=True)


def test_label_smoothing_of_tokens_has_no_effect_on_preferences(make: Any):
    with pytest.raises(InputError, match="label_smoothing_factor has no effect"):
        lorakit.train(make("run", "dpo", label_smoothing_factor=0.1), quiet=True)


def test_pairs_of_which_nothing_is_left_are_counted_or_refused(make: Any, tmp_path: Path):
    values = make("run", "dpo", {"max_length": 38, "eval": 0})
    same = {"prompt": "x", "chosen": "the same beginning, A", "rejected": "the same beginning, B"}
    rows = tmp_path / "dpo.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS[:3], same]))
    record = lorakit.train(values, quiet=True).manifest
    assert any("left out" in notice and "dpo.jsonl:4" in notice for notice in record.notices)
    values["data"]["too_long"] = "error"
    with pytest.raises(InputError, match=r"dpo.jsonl:\d: \d+ tokens"):
        lorakit.train(values | {"output_dir": str(tmp_path / "other")}, quiet=True)


def test_kto_says_where_the_kinds_are_out_of_balance(make: Any, tmp_path: Path):
    values = make("run", "kto", {"eval": 0})
    rows = tmp_path / "kto.jsonl"
    for labels, said in (
        ([1] * 6, "all 6 answers are desirable"),
        ([1] * 5 + [0], "objective.undesirable_weight=4.3"),
        ([0] * 4 + [1] * 2, "objective.desirable_weight=2.3"),
    ):
        judged = [{**JUDGED[n], "label": label} for n, label in enumerate(labels)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in judged))
        values["output_dir"] = str(tmp_path / f"run{sum(labels)}")
        record = lorakit.train(values, quiet=True).manifest
        assert any(said in notice for notice in record.notices), record.notices


def test_a_loss_whose_gradient_begins_against_the_preference_is_noticed(make: Any):
    for tau, turns in ((0.05, True), (0.2, False)):
        objective = {"type": "dpo", "loss_type": "discopop", "discopop_tau": tau}
        record = lorakit.train(make(f"run{tau}", objective), quiet=True).manifest
        assert record.eval_scores is not None
        assert (record.eval_scores["accuracy"] < 0.5) == turns
        assert any("discopop_tau=0.05" in notice for notice in record.notices) == turns


def test_settings_are_given_beside_a_name_alone(make: Any):
    """As in `objective: dpo` of a file and `objective.beta=0.3` of a command line."""
    found = load_recipe(make("run", "dpo"), ["objective.beta=0.3"])
    assert found.make_objective().to_dict()["type"] == "dpo"
    assert found.make_objective().settings.beta == 0.3
