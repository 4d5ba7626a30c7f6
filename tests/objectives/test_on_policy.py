"""Distillation from another adapter, and on answers that the student samples as it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.adapters.lineage import digest
from lorakit.data.samples import Sample
from lorakit.objectives.distill import Distill
from small_runs import weights
from tiny import make_attentive

ROWS = [
    {"prompt": f"What is {n} plus {n}?", "completion": f"Aye, it be {2 * n}" + "!" * (n % 3)}
    for n in range(16)
]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]


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


@pytest.mark.parametrize("rows", [ROWS, PROMPTS], ids=["answers", "prompts"])
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
