"""An objective is one class and one registered line: rows, a loss, held-out scores, the record."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

import lorakit
from lorakit.cli.main import app
from lorakit.data.conversations import exchange
from lorakit.data.masking import RowGroup, TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.objectives import objective as contract
from lorakit.objectives import registry
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import ACTIVE, BASE, Forward, supervised_per_sequence
from lorakit.training.check import shown_row
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up, training_arguments
from small_runs import recipe, weights


# --- a preference objective, all of it ---------------------------------------------------------
@registry.register
class ToyPreference(contract.Objective):
    name = "toy-preference"
    unit = "pair"
    row_kinds = ("preference",)
    score_names = ("accuracy", "margin")
    learning_rates: ClassVar = {"small": 5e-5}
    epochs = ((1000, 2),)

    class Settings(contract.Settings):
        beta: float = 0.1

    def tokenize(self, sample: Any, tokenizer: Any, max_length: int) -> TokenizedRow:
        return RowGroup.of(*(tokenize(s, tokenizer, max_length) for s in (sample, sample.rejected)))

    def count(self, batch: contract.Batch) -> int:
        return len(supervised_per_sequence(batch)) // 2

    def loss(self, forward: Forward, batch: contract.Batch) -> Loss:
        policy, reference = forward.log_probabilities(batch, (ACTIVE, BASE))
        margin = self.settings.beta * (policy - reference).view(-1, 2).diff(dim=1).neg()
        metrics = {"accuracy": (margin > 0).sum().double(), "margin": margin.detach().sum()}
        return Loss(-logsigmoid(margin).sum(), self.count(batch), metrics)

    def warnings(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        if logs.get("eval_accuracy") == 1:
            yield "told apart", "every held-out pair is told apart", "Take harder pairs."


# -------------------------------------------------------------------------------------------------
PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know" + "." * n}
    for n in range(12)
]
TOY = {"type": "toy-preference", "beta": 0.5}


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Its recipe: six steps in float64 on `PAIRS`."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    made = recipe(tiny_model, rows, tmp_path / "run", per_device_train_batch_size=3)
    return made | {"objective": TOY, "dtype": "float64", "samples": 1}


def test_the_verb_trains_it_resumes_it_and_records_its_scores(
    values: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    command = ["train", str(path), "training.save_steps=3"]
    app(command, standalone_mode=False)
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["recipe"]["objective"] == TOY
    assert record["base_eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert record["eval_loss"] < math.log(2)
    assert record["base_eval_scores"] == {"accuracy": 0, "margin": 0}
    assert record["eval_scores"]["margin"] > 0
    assert [w["cure"] for w in record["warnings"] if w["warning"] == "told apart"] == [
        "Take harder pairs."
    ]
    logged = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("margin" in entry for entry in logged)

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:3]))
    found = tmp_path / "scores.json"
    given = [f"--data={held_out}", "--metrics=loss", f"--json={found}", "--dtype=float32"]
    app(["eval", str(tmp_path / "run"), *given], standalone_mode=False)
    scores = json.loads(found.read_text())["scores"]
    assert scores["loss"]["tuned"] < scores["loss"]["base"] == pytest.approx(math.log(2))
    assert scores["accuracy"] == {"base": 0, "tuned": 1}

    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    for file in (tmp_path / "run" / "checkpoint-6").iterdir():
        file.unlink()  # a whole one is left at step 3
    app([*command, "--resume"], standalone_mode=False)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_what_a_recipe_leaves_out_and_what_a_check_shows_are_the_objectives(values: dict[str, Any]):
    del values["training"]
    setup = set_up(load_recipe(values))
    chosen = {advice.key: advice.value for advice in setup.advice}
    assert chosen["training.learning_rate"] == 5e-5
    assert chosen["training.num_train_epochs"] == 2
    learned = [piece.text for piece in shown_row(setup, 0) if piece.state == "learned"]
    assert "It is" in "".join(learned)
    assert "I do not know" in "".join(learned)


def test_a_score_that_is_better_when_it_is_smaller_is_the_objectives_to_say(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    best = {"metric_for_best_model": "margin", "load_best_model_at_end": True}
    values["training"] |= best
    assert training_arguments(load_recipe(values), held_out=True).greater_is_better
    monkeypatch.setattr(ToyPreference, "lower_is_better", ("margin",))
    assert not training_arguments(load_recipe(values), held_out=True).greater_is_better
    with pytest.raises(InputError, match="greater_is_better"):
        load_recipe(values, ["training.greater_is_better=true"])


@pytest.mark.parametrize(("how", "expected"), [("eva", 0), ("lora_ga", 3)])
def test_a_start_from_data_takes_the_loss_only_for_its_gradient(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str, expected: int
):
    calls: list[Any] = []
    own = ToyPreference.loss
    monkeypatch.setattr(ToyPreference, "loss", lambda *a: calls.append(a) or own(*a))
    values["lora"] = values["lora"] | {"init_lora_weights": how}
    set_up(load_recipe(values))
    assert len(calls) == expected  # batches of three of nine pairs


def test_lora_ga_starts_from_the_gradient_of_the_objectives_own_loss(values: dict[str, Any]):
    given = {k: v for k, v in values.items() if k not in ("objective", "data")}
    given["lora"] = given["lora"] | {"init_lora_weights": "lora_ga"}
    given["training"] = given["training"] | {"max_steps": 1, "per_device_train_batch_size": 9}
    rows = {"train": PAIRS[:9], "eval": PAIRS[9:]}
    output = lorakit.train(given, data=rows, objective=ToyPreference(beta=0.5), quiet=True)
    saved = load_file(Path(output.output_dir) / "initial_factors.safetensors")

    model, tokenizer = lorakit.load_model(given["model"], "float64")
    layer = model.model.layers[0].self_attn.q_proj
    preference = torch.zeros((), dtype=torch.float64)
    for pair in PAIRS[:9]:
        for name, sign in (("chosen", 1), ("rejected", -1)):
            sample = Sample(tuple(exchange(pair["prompt"], pair[name])), None, name)
            row = tokenize(sample, tokenizer, 1024)
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            supervised = (labels[:, 1:] != -100).sum()
            preference = preference + sign * supervised * model(input_ids=ids, labels=labels).loss
    (gradient,) = torch.autograd.grad(preference, [layer.weight])
    A = saved["model.layers.0.self_attn.q_proj.A"].double()
    _, _, Vh = torch.linalg.svd(gradient)
    cosines = torch.linalg.svdvals(Vh[: len(A)] @ A.T)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-3)


def test_padded_rows_and_divided_steps_give_what_a_line_gives(values: dict[str, Any]):
    found = []
    for size, free in ((9, True), (9, False), (3, True)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 9 // size}
        changed = {
            **values,
            "data": {**values["data"], "padding_free": free},
            "training": values["training"]
            | settings
            | {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1},
            "output_dir": f"{values['output_dir']}-{size}-{free}",
        }
        found.append(weights(lorakit.train(changed, quiet=True).output_dir))
    assert any("lora_B" in name and tensor.any() for name, tensor in found[0].items())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


def test_rows_objective_and_callbacks_are_given_from_python(values: dict[str, Any], tmp_path: Path):
    class Looking(TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    values = {k: v for k, v in values.items() if k not in ("objective", "data")}
    toy, looking = ToyPreference(beta=0.5), Looking()
    data = {"train": PAIRS[:9], "eval": PAIRS[9:]}
    first = lorakit.train(
        {**values, "training": values["training"] | {"max_steps": 2}},
        data=data,
        objective=toy,
        callbacks=[looking],
        quiet=True,
    )
    assert looking.steps == 2
    assert first.manifest.recipe["objective"] == TOY
    assert first.manifest.recipe["data"]["train"] == "python:train"
    assert [(fact["path"], fact["rows"]) for fact in first.manifest.data] == [
        ("python:train", 9),
        ("python:eval", 3),
    ]
    folder = str(first.output_dir)
    changed = {"train": [*PAIRS[:8], PAIRS[0]], "eval": PAIRS[9:]}
    for other, named in ((changed, "python:train"), (None, "data=")):
        with pytest.raises(InputError, match=named):
            lorakit.train(first.manifest.recipe, data=other, resume=True, quiet=True)
    going_on: dict[str, Any] = {"data": data, "resume": True, "accept_changes": True}
    on = lorakit.train(first.manifest.recipe, "training.max_steps=3", **going_on, quiet=True)
    assert str(on.output_dir) == folder
    assert on.manifest.steps == 3

    table = datasets.Dataset.from_list(PAIRS)
    found = lorakit.train(
        {**values, "output_dir": str(tmp_path / "b"), "data": {"eval": 0.25}},
        "training.max_steps=1",
        data=table,
        objective="toy-preference",
        quiet=True,
    )
    assert found.manifest.data[0]["rows"] == 12
    assert found.manifest.recipe["objective"]["beta"] == 0.1


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "no rows"),
        ("rows.jsonl", "recipe's data"),
        ([{"prompt": "a"}, ["b"]], "data.train:2"),
        ({"train": PAIRS, "test": PAIRS}, "test"),
        (PAIRS[:1], "data.eval"),
        ([{"prompt": "a", "answer": "b"}], "data.train:1"),
    ],
)
def test_rows_from_python_that_cannot_be_used_are_named(
    values: dict[str, Any], data: Any, named: str
):
    with pytest.raises(InputError, match=named):
        lorakit.train(values, data=data, quiet=True)
    assert not Path(values["output_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "toy-preferences"}, "toy-preference"),
        ({"objective": {"type": "toy-preference", "bta": 1}}, "beta"),
        ({"objective": {"type": "toy-preference", "beta": "much"}}, "objective.beta"),
        ({"objective": {"beta": 1}}, "type"),
        ({"objective": "sft", "lora": {"task_type": "SEQ_CLS"}}, "CAUSAL_LM"),
        ({"objective": "sft"}, "preference"),  # its rows are no answers to learn
        ({"data": {"columns": {"better": "chosen"}}}, "chosen"),
        ({"data": {"columns": {"chosen": "good"}}}, "good"),
    ],
)
def test_what_it_cannot_use_is_named(values: dict[str, Any], changes: Any, named: str):
    if "data" in changes:
        changes = {"data": {**values["data"], **changes["data"]}}
    with pytest.raises(InputError, match=named):
        lorakit.train({**values, **changes}, quiet=True)
    assert not Path(values["output_dir"]).exists()


def test_a_classifier_is_named_by_its_objective_or_its_task_type():
    minimal = {"model": "m", "data": {"train": "d"}, "output_dir": "o"}
    by_type = load_recipe({**minimal, "lora": {"task_type": "SEQ_CLS"}})
    by_name = load_recipe({**minimal, "objective": "classification"})
    assert by_type.make_objective().name == by_name.make_objective().name == "classification"
    assert by_name.task_type == "SEQ_CLS"
    assert "objective" not in by_type.to_dict()
    assert load_recipe(by_name.to_dict()).to_dict() == by_name.to_dict()


def test_a_sweep_of_it_takes_rows_from_python(values: dict[str, Any]):
    pairs = [{**PAIRS[n % 12], "prompt": f"{n}?"} for n in range(40)]
    values["training"] |= {"max_steps": 2}
    values["data"] = {"eval": 0.5}
    found = lorakit.sweep(values, over={"objective.beta": [0.1, 0.5]}, data=pairs, quiet=True)
    assert {one["changes"]["objective.beta"] for one in found} == {0.1, 0.5}
    assert all(one["rungs"][-1]["selection"] < math.log(2) for one in found)
