"""Sweeps over settings of preference objectives: shared passes, and what the best is chosen by."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.errors import InputError
from lorakit.sweeps.splits import REPORT, SELECTION
from lorakit.training.recipe import load_recipe
from matrix import few
from small_runs import recipe, weights
from sweeps.shared_sweeps import configurations, distance, runner_for, solo

PAIRS = [
    {
        "prompt": f"{'now ' * (n % 3)}{n} + {n}?",
        "chosen": f"It is {2 * n}.",
        "rejected": "I do not know" + "." * (n % 5),
    }
    for n in range(40)
]
JUDGED = [
    {"prompt": p["prompt"], "completion": p["chosen" if n % 2 else "rejected"], "label": n % 2}
    for n, p in enumerate(PAIRS)
]
OTHERS: list[dict[str, Any]] = [
    {"lora.r": 7, "training.learning_rate": 3e-3, "lora.lora_dropout": 0.3},
    {"training.per_device_train_batch_size": 3, "training.gradient_accumulation_steps": 2},
]
SWEPT: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        {"objective.beta": 0.05},
        {"objective.beta": 0.7, "objective.loss_type": "ipo", "training.seed": 7},
        {"objective.loss_type": ["sigmoid", "sft"], "objective.precompute_ref_log_probs": False},
        {"objective.ld_alpha": 0.5},
        {"objective.loss_type": "aot", "training.gradient_accumulation_steps": 2},
    ],
    "kto": [
        {"objective.beta": 0.7, "objective.desirable_weight": 1.5},
        {"objective.loss_type": "apo_zero_unpaired"},
    ],
    "simpo": [{"objective.beta": 1.5}, {"objective.simpo_gamma": 1.1}],
    "orpo": [{"objective.beta": 0.5}],
}


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(model: Path, folder: Path, objective: Any, rows: Any = PAIRS, **training: Any) -> Any:
    path = written(folder, rows)
    values = recipe(model, path, folder / "base", **{"max_steps": 3, "seed": 3} | training)
    values["data"] |= {"eval": 0.5, "seed": 1}
    return values | {"objective": objective, "dtype": "float64", "compile": False}


LINES = [(kind, "lines") for kind in SWEPT]


@pytest.mark.parametrize(
    ("kind", "form"),
    few(
        [*LINES, ("dpo", "padded and checkpointed"), ("kto", "padded and checkpointed")],
        *(("dpo", "lines"), ("kto", "lines")),
    ),
)
def test_configurations_beside_each_other_give_the_weights_of_their_solo_runs(
    kind: str, form: str, tiny_model: Path, tmp_path: Path
):
    rows = JUDGED if kind == "kto" else PAIRS
    values = made(tiny_model, tmp_path, kind, rows, eval_strategy="no")
    if form == "padded and checkpointed":
        values["data"]["padding_free"] = False
        values["training"]["activation_checkpointing"] = True
    sweep = configurations(values, tmp_path / "sweep", [*SWEPT[kind], *OTHERS])
    runner = runner_for(values, at_once=len(sweep))
    [(_, group)], alone = runner._groups(sweep)
    assert (len(group), alone) == (len(sweep), [])
    found = runner.advance(sweep, 1.0)
    for configuration in sweep:
        progress = found[configuration.name]
        assert (progress.step, progress.diverged) == (3, None)
        wanted = solo(configuration, tmp_path / "solo")
        own = weights(Path(configuration.recipe.output_dir))
        assert distance(own, wanted) < 1e-9, configuration.changes
        record = read_manifest(tmp_path / "solo" / configuration.name)
        assert record is not None
        assert progress.scores["loss"] == pytest.approx(record.eval_loss, abs=1e-9)
        for name, value in (record.eval_scores or {}).items():
            assert progress.scores[name] == pytest.approx(value, abs=1e-9), name


def test_the_reference_is_computed_once_for_all_configurations(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lorakit.objectives.forward import Forward

    rows: list[int] = []
    of_reference = Forward.of_reference

    def counted(self: Forward, batch: Any, adapter: str) -> Any:
        rows.append(int((batch["cu_seq_lens_q"][1:] > 0).sum()))
        return of_reference(self, batch, adapter)

    monkeypatch.setattr(Forward, "of_reference", counted)
    values = made(tiny_model, tmp_path, "dpo", eval_strategy="no")
    values["data"]["share_prefixes"] = False
    sweep = configurations(values, tmp_path, [{"objective.beta": beta} for beta in (0.1, 0.3, 1)])
    runner_for(values, at_once=3).advance(sweep, 1.0)
    assert sum(rows) == 2 * len(PAIRS), "both answers of each pair, learned or held out"


@pytest.mark.parametrize("objective", [{"type": "kto"}, {"type": "dpo", "loss_type": "aot"}])
def test_what_a_loss_needs_of_all_rows_is_computed_in_passes_that_configurations_share(
    objective: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    objective |= {"precompute_ref_log_probs": True}
    rows = JUDGED if objective["type"] == "kto" else PAIRS
    values = made(tiny_model, tmp_path, objective, rows[:20])
    values["training"] |= {"eval_strategy": "no", "per_device_train_batch_size": 4}
    passes: list[int] = []

    def note(module: Any, inputs: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > 50:  # fewer are trials of what a model takes
            passes.append(given["input_ids"].numel())

    found = []
    for number in (1, 3):
        passes.clear()
        changes = [{"objective.beta": 0.1 * n} for n in range(1, 1 + number)]
        sweep = configurations(values, tmp_path / str(number), changes)
        runner = runner_for(values, at_once=number)
        runner.base.inputs.model.register_forward_pre_hook(note, with_kwargs=True)
        runner.advance(sweep, 1.0)
        found.append(list(passes))
    assert len(found[1]) == len(found[0])
    assert sum(found[1]) > 1.5 * sum(found[0])


def test_weighted_pairs_are_trained_and_scored_beside_a_sweep_that_shares_passes(
    tiny_model: Path, tmp_path: Path
):
    values = made(tiny_model, tmp_path, "dpo", eval_strategy="no")
    sweep = configurations(
        values, tmp_path / "sweep", [{"objective.use_weighting": True}, {"objective.beta": 0.3}]
    )
    runner = runner_for(values, at_once=2)
    [(_, [other])], [weighted] = runner._groups(sweep)
    assert (weighted.name, other.name) == ("c00", "c01")
    progress = runner.advance(sweep, 1.0)[weighted.name]
    wanted = solo(weighted, tmp_path / "solo")
    assert distance(weights(Path(weighted.recipe.output_dir)), wanted) < 1e-9
    record = read_manifest(tmp_path / "solo" / weighted.name)
    assert record is not None
    assert progress.scores["loss"] == pytest.approx(record.eval_loss, abs=1e-9)
    bare = runner.base.bare_scores(weighted.recipe.make_objective())
    assert bare["loss"] == pytest.approx(record.base_eval_loss, abs=1e-9)


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The table of a sweep over beta and learning rate, by TRL's name of the margin."""
    folder = tmp_path_factory.mktemp("swept")
    values = made(tiny_model, folder, "dpo", max_steps=9, learning_rate=1e-2)
    values["output_dir"] = str(folder / "sweep")
    over = {"objective.beta": [0.05, 0.5], "training.learning_rate": [1e-6, 2e-2]}
    lorakit.sweep(values, over=over, objective="eval_rewards/margins", quiet=True)
    return json.loads((folder / "sweep" / "leaderboard.json").read_text())


def test_a_held_out_score_chooses_at_every_rung(swept: Any):
    first, *others = swept["configurations"]
    assert (swept["objective"], first["share"]) == ("margin", 1)
    assert [row["status"] for row in others] == ["stopped"] * 3
    found = {}
    for row in swept["configurations"]:
        progress = json.loads((Path(row["folder"]) / "sweep-progress.json").read_text())
        margins = progress["rungs"][0]["metrics"]["selection"]["margin"]
        found[row["name"]] = sum(margins) / len(margins)
    assert found[first["name"]] == max(found.values()) > min(found.values())
    for row in others:
        assert row["selection"]["mean"] == pytest.approx(found[row["name"]])
        assert row["selection"]["low"] < row["selection"]["mean"] < row["selection"]["high"]
    assert any("objective of the recipe (beta=0.1)" in line for line in swept["notices"])


def test_the_record_has_the_scores_by_its_own_settings(swept: Any):
    winner = swept["configurations"][0]
    record = read_manifest(Path(winner["folder"]))
    assert record is not None
    assert record.eval_scores is not None
    assert record.base_eval_scores is not None
    sizes = [swept["rows"][split] for split in (SELECTION, REPORT)]
    means = [winner[split]["mean"] for split in (SELECTION, REPORT)]
    both = sum(n * mean for n, mean in zip(sizes, means, strict=True)) / sum(sizes)
    beta = winner["changes"]["objective.beta"]
    assert load_recipe(record.recipe).make_objective().settings.beta == beta
    # The table compares by the beta of the recipe, and the record has the configuration's own.
    assert record.eval_scores["margin"] == pytest.approx(both * beta / 0.1, rel=1e-9)
    assert record.base_eval_scores["margin"] == 0
    assert record.base_eval_scores["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("kind", "rows", "name", "lowest"),
    [
        pytest.param("orpo", PAIRS, "margin", False, marks=pytest.mark.exhaustive),
        ("dpo", PAIRS, "logps/rejected", True),
        pytest.param("kto", JUDGED, "kl", True, marks=pytest.mark.exhaustive),
        pytest.param("dpo", PAIRS, "rouge", False, marks=pytest.mark.exhaustive),
    ],
)
def test_the_direction_of_every_score_is_known(
    kind: str, rows: Any, name: str, lowest: bool, tiny_model: Path, tmp_path: Path
):
    values = made(tiny_model, tmp_path, kind, rows, max_steps=2)
    over = {"training.learning_rate": [1e-5, 5e-3]}
    found = lorakit.sweep(values, over=over, objective=name, prune=False, quiet=True)
    one, other = (row["selection"]["mean"] for row in found)
    assert one <= other if lowest else one >= other


@pytest.mark.parametrize(
    ("kind", "over", "name", "said"),
    [
        ("dpo", {"objective.beta": [0.1, 0.2]}, "acuracy", "accuracy, margin"),
        ("sft", {"lora.r": [2, 4]}, "accuracy", "loss, exact_match"),
        ("reward", {"lora.r": [2, 4]}, "bleu", "reward writes no answers"),
        ("dpo", {"objective": ["dpo", "orpo"]}, "loss", "have one objective"),
        ("sft", {"objective.learn": ["all", "last"]}, "loss", "changes the rows"),
    ],
)
def test_what_cannot_be_swept_or_chosen_by_is_named(
    kind: str, over: Any, name: str, said: str, tiny_model: Path, tmp_path: Path
):
    sft = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    values = made(tiny_model, tmp_path, kind, sft if kind == "sft" else PAIRS)
    with pytest.raises(InputError, match=said):
        lorakit.sweep(values, over=over, objective=name, quiet=True)
    assert not list((tmp_path / "base").glob("*/checkpoint-*"))


@pytest.mark.parametrize(
    ("metric", "learning_rate", "stops"),
    [("eval_rewards/accuracies", 1e-30, True), ("rewards/rejected", 1e-2, False)],
)
def test_early_stopping_goes_by_held_out_scores(
    metric: str, learning_rate: float, stops: bool, tiny_model: Path, tmp_path: Path
):
    values = made(
        tiny_model,
        tmp_path,
        "dpo",
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=learning_rate,
        metric_for_best_model=metric,
    )
    values["early_stopping_patience"] = 2
    assert (lorakit.train(values, quiet=True).manifest.steps < 5) == stops


def test_a_metric_that_no_evaluation_gives_is_refused_with_those_that_there_are(
    tiny_model: Path, tmp_path: Path
):
    values = made(tiny_model, tmp_path, "dpo", metric_for_best_model="eval_rewards/acc")
    values["early_stopping_patience"] = 2
    with pytest.raises(InputError, match="accuracy, margin"):
        lorakit.train(values, quiet=True)
