"""An adapter learns, without a prompt, the probabilities that the base has behind it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.data.masking import RowWithSecond
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.models.divergence import chunked, generalized_jsd
from lorakit.objectives.distill import Distill
from lorakit.training.recipe import load_recipe
from small_runs import lines, weights

SYSTEM = "Answer as a pirate does, and never say the number seven."
ROWS = [
    {"prompt": f"What is {n} plus {n}?", "completion": f"Aye, it be {2 * n}" + "!" * (n % 3)}
    for n in range(20)
]


@pytest.fixture
def base(attentive_folder: Path) -> Path:
    return attentive_folder


def recipe(base: Path, output: Path, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "dtype": "float64",
        "data": {"eval": 0.25, **changes.pop("data", {})},
        "lora": {"r": 4},
        "objective": {"type": "distill", "system": SYSTEM, "lmbda": 0.0, **objective},
        "training": {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2} | changes,
        "samples": 0,
        "output_dir": str(output),
    }


def logits_at_answers(model: Any, row: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
    return found[torch.tensor(row.labels[1:]) != -100]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_from_the_base_behind_the_prompt(
    base: Path, tmp_path: Path, beta: float
):
    settings = {"beta": beta, "temperature": 0.7}
    found = lorakit.train(recipe(base, tmp_path / "a", settings), data=ROWS, quiet=True).manifest
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    request = load_recipe(found.recipe)
    objective = Distill(system=SYSTEM, **settings)
    total = count = agreed = 0
    held = [r for r in ROWS if r["prompt"] not in _learned(tmp_path / "a", request)]
    assert len(held) == 5
    for row in held:
        messages = (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
        both = objective.tokenize(Sample(messages, None, "x"), tokenizer, 1024)
        assert isinstance(both, RowWithSecond)
        s, t = logits_at_answers(model, both), logits_at_answers(model, both.second)
        p, q = F.softmax(t / 0.7, -1), F.softmax(s / 0.7, -1)
        if beta == 0:
            own = (p * (p / q).log()).sum()
        elif beta == 1:
            own = (q * (q / p).log()).sum()
        else:
            m = beta * p + (1 - beta) * q
            own = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
        total, count = total + own.item(), count + len(s)
        agreed += int((s.argmax(-1) == t.argmax(-1)).sum())
    assert found.base_eval_loss == pytest.approx(total / count, abs=1e-9)
    assert found.base_eval_scores is not None
    assert found.base_eval_scores["agreement"] == pytest.approx(agreed / count)
    assert found.eval_loss is not None
    assert found.eval_loss < 0.9 * found.base_eval_loss


def _learned(folder: Path, recipe: Any) -> set[str]:
    """The prompts of the rows that were not held out, by the split of the same seed."""
    from lorakit.data.dataset import prepare
    from lorakit.data.sources import rows_from_python

    with rows_from_python(ROWS) as sources:
        data = prepare(
            AutoTokenizer.from_pretrained(recipe.model), sources["data.train"], 0.25, seed=42
        )
    return {sample.prompt[0]["content"] for sample in data.train_samples}


def test_gradients_in_chunks_are_those_of_the_whole_formula():
    torch.manual_seed(0)
    h, W = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    teacher, weight = torch.randn(7, 11, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for beta, top_k in ((0.0, None), (0.4, None), (1.0, None), (0.4, 3), (0.0, 3), (1.0, 11)):
        x, y = (h.clone().requires_grad_() for _ in range(2))

        def values(part: torch.Tensor, at: slice, beta=beta, top_k=top_k) -> torch.Tensor:
            return generalized_jsd(part @ W.T, teacher[at], beta, top_k)

        whole = values(x, slice(None))
        parts = chunked(y, values, classes=2**22)  # two rows at a time
        assert torch.allclose(whole, parts, atol=1e-12)
        (whole * weight).sum().backward()
        (parts * weight).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert torch.allclose(x.grad, y.grad, atol=1e-12)
    assert (generalized_jsd(teacher, teacher, 0.4, 3).abs() < 1e-12).all()


def test_padded_rows_and_divided_steps_give_what_a_line_gives(base: Path, tmp_path: Path):
    found = []
    for size, free in ((8, True), (8, False), (4, True)):
        made = recipe(
            base,
            tmp_path / f"{size}{free}",
            {},
            data={"padding_free": free},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        found.append(weights(lorakit.train(made, data=ROWS, quiet=True).output_dir))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


def test_with_seq_kd_prompts_are_answered_by_the_teacher(base: Path, tmp_path: Path):
    asked = [{"prompt": row["prompt"]} for row in ROWS]
    runs = []
    for name in ("a", "b"):
        made = recipe(base, tmp_path / name, {"max_new_tokens": 6, "beta": 0.0, "seq_kd": True})
        runs.append(lorakit.train(made, data=asked, quiet=True))
    first, second = (run.manifest for run in runs)
    assert first.eval_loss is not None
    assert first.base_eval_loss is not None
    assert first.eval_loss < first.base_eval_loss
    assert first.eval_loss == second.eval_loss
    assert math.isclose(first.base_eval_loss, second.base_eval_loss)
    logged = lines(tmp_path / "a" / "metrics.jsonl")
    assert any("agreement" in entry for entry in logged)


@pytest.mark.parametrize(
    ("objective", "rows", "named"),
    [
        ({"beta": 1.5}, ROWS, "objective.beta"),
        ({"temperature": 0}, ROWS, "objective.temperature"),
        ({"lambda": 1}, ROWS, "objective.lambda"),
        ({}, [{"text": "plain text"}] * 8, "data.train:1"),
        ({}, [{"prompt": ""}] * 8, "data.train:1"),
        ({}, [{"prompt": row["prompt"]} for row in ROWS], r"has no answer.*lmbda=1\.0"),
        ({"system": ""}, ROWS, "nothing to learn"),
        ({"lmbda": 1.5}, ROWS, "objective.lmbda"),
    ],
)
def test_what_it_cannot_use_is_named(
    base: Path, tmp_path: Path, objective: dict[str, Any], rows: Any, named: str
):
    with pytest.raises(InputError, match=named):
        lorakit.train(recipe(base, tmp_path / "a", objective), data=rows, quiet=True)
    assert not (tmp_path / "a").exists()
