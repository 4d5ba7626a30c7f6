"""Distillation from another adapter, and on answers that the student samples as it learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit
from command import run_lorakit
from lorakit.adapters.inspect import inspect
from lorakit.adapters.lineage import digest
from lorakit.adapters.manifest import read_manifest
from lorakit.data.batches import Collator
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.objectives.distill import Distill
from lorakit.rl.rollouts import Rollouts
from small_runs import weights
from tiny import make_attentive

ROWS = [
    {"prompt": f"What is {n} plus {n}?", "completion": f"Aye, it be {2 * n}" + "!" * (n % 3)}
    for n in range(16)
]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
TURNS = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
"""The same prompts as conversations that end before an answer."""


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights by which an answer depends on all that stands before it."""
    folder = tmp_path_factory.mktemp("attentive")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    make_attentive(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT has written, of another rank and other layers than the student's."""
    folder = tmp_path_factory.mktemp("peft")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    config = PeftConfig(r=2, lora_alpha=4, target_modules=["o_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def recipe(base: Path, output: Path, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "dtype": "float64",
        "data": {"eval": 0.25, **changes.pop("data", {})},
        "lora": {"r": 4},
        "objective": {"type": "distill", "max_new_tokens": 8, **objective},
        "training": {
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
        }
        | changes.pop("training", {}),
        "samples": 0,
        "output_dir": str(output),
        **changes,
    }


def kl(model: Any, teacher: Any, tokens: list[int], labels: list[int]) -> torch.Tensor:
    """KL(teacher | model) at the learned tokens, in nats."""
    ids, at = torch.tensor([tokens]), torch.tensor(labels[1:]) != -100
    with torch.no_grad():
        t, s = (F.log_softmax(m(input_ids=ids).logits[0, :-1][at], -1) for m in (teacher, model))
    return (t.exp() * (t - s)).sum(-1)


def test_another_adapter_may_be_the_teacher(base: Path, teacher: Path, tmp_path: Path):
    made = recipe(base, tmp_path / "a", {"teacher": str(teacher), "lmbda": 0.0, "beta": 0.0})
    del made["data"]
    found = lorakit.train(made, data={"train": ROWS[:12], "eval": ROWS[12:]}, quiet=True).manifest
    assert found.teacher is not None
    assert found.teacher.path == str(teacher)
    assert found.teacher.sha256 == digest(teacher)
    tokenizer = AutoTokenizer.from_pretrained(base)
    one, other = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in "ab")
    taught = PeftModel.from_pretrained(one, teacher).eval()
    learned = PeftModel.from_pretrained(other, tmp_path / "a").eval()
    objective = Distill(teacher=str(teacher))
    values = {"student": [], "base": []}
    for row in ROWS[12:]:
        messages = (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
        both = objective.tokenize(Sample(messages, None, "x"), tokenizer, 1024)
        values["student"].append(kl(learned, taught, both.input_ids, both.labels))
        with learned.disable_adapter():
            values["base"].append(kl(learned, taught, both.input_ids, both.labels))
    student, bare = (torch.cat(values[name]).mean().item() for name in ("student", "base"))
    assert found.eval_scores is not None
    assert found.base_eval_scores is not None
    assert found.eval_scores["kl"] == pytest.approx(student, abs=1e-6)  # adapters are float32
    assert found.base_eval_scores["kl"] == pytest.approx(bare, abs=1e-9)
    assert student < bare


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ROWS, id="answers"),
        pytest.param(TURNS, id="prompts", marks=pytest.mark.exhaustive),
    ],
)
def test_the_same_seed_samples_the_same_answers_and_another_one_others(
    base: Path, teacher: Path, tmp_path: Path, rows: Any
):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = {"teacher": str(teacher), "lmbda": 1.0, "seed": seed}
        made = recipe(base, tmp_path / name, settings)
        run = lorakit.train(made, data=rows, quiet=True)
        found.append(weights(run.output_dir))
        assert run.manifest.eval_scores is not None
        assert run.manifest.base_eval_scores is not None
        assert run.manifest.eval_scores["kl"] < run.manifest.base_eval_scores["kl"]
        assert 0 < run.manifest.supervised_tokens <= 4 * 4 * 8
    first, same, other = found
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_run_that_has_stopped_resumes_to_the_same_bytes(
    base: Path, teacher: Path, tmp_path: Path
):
    made = recipe(base, tmp_path / "run", {"teacher": str(teacher), "lmbda": 0.5})
    made["training"] |= {"save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    made["training"]["per_device_train_batch_size"] = 2
    made["lora"]["lora_dropout"] = 0.1
    made["data"]["packing"] = True
    lorakit.train(made, data=ROWS, quiet=True)
    folder = tmp_path / "run"
    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    for file in (folder / "checkpoint-4").iterdir():
        file.unlink()
    lorakit.train(made, data=ROWS, resume=True, quiet=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_answers_are_the_same_however_a_step_is_divided(base: Path, teacher: Path):
    objective = Distill(teacher=str(teacher), lmbda=1.0, max_new_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LoraModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), None).eval()
    rows = [objective.tokenize(_sample(row), tokenizer, 200) for row in PROMPTS[:4]]

    def collate(some: Any) -> dict[str, torch.Tensor]:
        return objective.to_batch(some, Collator(258))

    def learned(step: int, *batches: Any) -> list[list[int]]:
        """The answers of each row, in order."""
        made = student.put_into([collate(some) for some in batches], model, step)
        return [[x for x in row if x != -100] for one in made for row in one["labels"].tolist()]

    student = Rollouts(objective, tokenizer, collate)
    whole = learned(3, rows)
    assert learned(3, rows[:2], rows[2:]) == whole
    assert [*learned(3, rows[:1]), *learned(3, rows[1:])] == whole
    assert learned(4, rows) != whole
    first, second = learned(3, [rows[0], rows[0]])
    assert first == whole[0]
    assert second != first, "the same prompt again gets another answer"
    half = Distill(teacher=str(teacher), lmbda=0.5)
    drawn = [len(half.asked(collate(rows), step)) for step in range(40)]
    assert {*drawn} == {0, 4}
    assert 10 < drawn.count(4) < 30


def _sample(row: dict[str, str]) -> Sample:
    answer = {"role": "assistant", "content": row.get("completion", "")}
    return Sample(({"role": "user", "content": row["prompt"]}, answer), None, "x")


def test_a_student_on_top_of_a_frozen_adapter_learns_from_a_teacher_without_it(
    base: Path, teacher: Path, tmp_path: Path
):
    start = {"path": str(teacher), "mode": "freeze"}
    found = {}
    for name, own in (("same", str(teacher)), ("bare", None)):
        made = recipe(base, tmp_path / name, {"teacher": own, "lmbda": 1.0}, adapter=start)
        found[name] = lorakit.train(made, data=PROMPTS, quiet=True).manifest
        assert len(found[name].stands_on) == 1
    scores = {name: run.start_eval_scores for name, run in found.items()}
    assert scores["same"] is not None
    assert scores["bare"] is not None
    assert scores["same"]["kl"] == pytest.approx(0, abs=1e-9), "teacher and start are the same"
    assert scores["bare"]["kl"] > 0.01
    bare = found["bare"].eval_scores
    assert bare is not None
    assert bare["kl"] < scores["bare"]["kl"], "the new adapter leads back to the base"


def test_a_distilled_adapter_is_evaluated_inspected_and_reproduced_with_its_teacher(
    base: Path, teacher: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    beside = tmp_path / "teacher"
    shutil.copytree(teacher, beside)
    made = recipe(base, tmp_path / "run", {"teacher": str(beside), "lmbda": 1.0})
    made["data"] = {"train": str(rows), "eval": str(rows)}
    found = lorakit.train(made, quiet=True).manifest
    assert found.eval_scores is not None
    again = run_lorakit(tmp_path, "reproduce", "run", "-o", "again")
    assert again.returncode == 0, again.stderr
    assert read_manifest(tmp_path / "again").teacher == found.teacher  # type: ignore[union-attr]
    scores = tmp_path / "scores.json"
    asked = (
        "eval",
        "run",
        f"--data={rows}",
        "--metrics=loss",
        f"--json={scores}",
        "--dtype=float64",
    )
    assert run_lorakit(tmp_path, *asked).returncode == 0
    own = json.loads(scores.read_text())["scores"]["kl"]["tuned"]
    assert own == pytest.approx(found.eval_scores["kl"], rel=1e-6)
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    done = run_lorakit(tmp_path, "eval", "run", "--data=prompts.jsonl", "--metrics=loss")
    assert done.returncode == 2
    assert "no answer" in done.stderr
    assert inspect(tmp_path / "run").teacher.state == "unchanged"  # type: ignore[union-attr]
    shutil.rmtree(beside)
    for command in (asked, ("reproduce", "run", "-o", "third")):
        done = run_lorakit(tmp_path, *command)
        assert done.returncode == 2
        assert "missing" in done.stderr
    done = run_lorakit(tmp_path, "inspect", "run")
    assert done.returncode == 0
    assert "missing" in done.stdout


def test_a_sweep_over_an_objectives_setting_learns_from_the_teacher_too(
    base: Path, teacher: Path, tmp_path: Path
):
    made = recipe(base, tmp_path / "swept", {"teacher": str(teacher), "lmbda": 1.0})
    made["data"] = {"eval": 0.5}
    rows = [{"prompt": f"{n}, what is it?"} for n in range(40)]
    found = lorakit.sweep(made, over={"objective.beta": [0.0, 1.0]}, data=rows, quiet=True)
    records = [read_manifest(one["folder"]) for one in found]
    assert len(records) == 2
    for record in records:
        assert record is not None
        assert record.teacher is not None
        assert record.eval_loss is not None
        assert record.base_eval_loss is not None
        assert record.eval_loss < record.base_eval_loss


def test_prompts_without_room_for_an_answer_are_left_out(base: Path, teacher: Path, tmp_path: Path):
    long = [{"prompt": "again " * 30}, {"prompt": "again " * 200}]
    made = recipe(base, tmp_path / "run", {"teacher": str(teacher), "lmbda": 1.0})
    made["data"] = {"max_length": 60}
    data = {"train": [*PROMPTS, *long], "eval": [*PROMPTS[:3], *long]}
    found = lorakit.train(made, data=data, quiet=True).manifest
    assert found.data_statistics["train"]["rows"] == 16
    assert found.data_statistics["eval"]["rows"] == 3
    assert not any("without an answer" in line for line in found.notices)


def other_base(base: Path, folder: Path) -> Path:
    """An adapter that was trained on other weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model.model.norm.weight.data *= 1.1
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    made = recipe(folder / "base", folder / "a", {"type": "sft"})
    made["objective"] = "sft"
    made["training"]["max_steps"] = 1
    return lorakit.train(made, data=ROWS, quiet=True).output_dir


def other_size(folder: Path) -> Path:
    """An adapter of PEFT's for a model of another size."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99))
    get_peft_model(model, PeftConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def more_tokens(base: Path, folder: Path) -> Path:
    """An adapter of PEFT's for a model with two tokens more."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(261)
    adapted = get_peft_model(model, PeftConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return folder


def test_a_teacher_that_does_not_fit_is_refused_before_training(
    base: Path, teacher: Path, tmp_path: Path
):
    biased = tmp_path / "biased"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PeftConfig(r=2, bias="all")).save_pretrained(biased)
    for folder, named in (
        (other_base(base, tmp_path), "other weights"),
        (other_size(tmp_path / "small"), "objective.teacher"),
        (tmp_path / "nowhere", "objective.teacher"),
        (biased, "bias"),
        (more_tokens(base, tmp_path / "more"), "same vocabulary"),
    ):
        made = recipe(base, tmp_path / "run", {"teacher": str(folder)})
        with pytest.raises(InputError, match=named):
            lorakit.train(made, data=ROWS, quiet=True)
        assert not (tmp_path / "run").exists()
    made = recipe(base, tmp_path / "run", {"teacher": str(teacher)})
    with pytest.raises(InputError, match=r"bias.*reference"):
        lorakit.train(made | {"lora": {"r": 4, "bias": "all"}}, data=ROWS, quiet=True)
