"""`lorakit train` with objective grpo: on real rows, models and files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from command import run_lorakit
from lorakit.errors import InputError, LorakitError
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.objectives.completion_rows import PREFIX, CompletionGroup
from lorakit.objectives.grpo import Grpo
from lorakit.rl.rollouts import Rollouts
from lorakit.training import trainer
from small_runs import lines, weights

ROWS = [{"prompt": f"Say {n} " * (1 + n % 3), "n": n} for n in range(12)]


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of vowels: what a model of bytes can learn in a few steps."""
    return [sum(map(text.count, "aeiou")) / 8 for text in completions]


def recipe(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    training = {
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 2,
    }
    return {
        "model": str(model),
        "dtype": "float32",
        "data": {"eval": 0.25} | changes.pop("data", {}),
        "lora": {"r": 4, "lora_alpha": 8} | changes.pop("lora", {}),
        "training": training | changes.pop("training", {}),
        "samples": 0,
        "output_dir": str(output),
        **changes,
    }


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "type": "grpo",
        "num_generations": 4,
        "max_completion_length": 8,
        "rewards": [vowels],
        **changes,
    }


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder / "metrics.jsonl") if name in line]


def test_what_is_rewarded_becomes_likelier_and_held_out_prompts_show_it(
    attentive_folder: Path, tmp_path: Path
):
    made = recipe(attentive_folder, tmp_path / "run", training={"max_steps": 30})
    found = lorakit.train(made, data=ROWS, objective=settings(temperature_eval=1.0), quiet=True)
    rewards = logged(tmp_path / "run", "reward")
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    before, after = found.manifest.base_eval_scores, found.manifest.eval_scores
    assert before is not None
    assert after is not None
    assert after["reward"] > before["reward"]
    assert after["rewards/vowels/mean"] == after["reward"] == pytest.approx(-found.eval_loss)
    assert found.manifest.recipe["objective"]["rewards"] == ["python:vowels"]
    for name in ("entropy", "completions/mean_length", "frac_reward_zero_std"):
        assert len(logged(tmp_path / "run", name)) == 30
    assert logged(tmp_path / "run", "sampled_tokens_per_second")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="line"),
        pytest.param({"data": {"padding_free": False}}, id="padded"),
        pytest.param({"dtype": "bfloat16"}, id="bf16"),
    ],
)
def test_sampler_and_trainer_have_the_same_log_probabilities(
    attentive_folder: Path, tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
):
    model = tiny_model if "dtype" in changes else attentive_folder
    made = recipe(model, tmp_path / "run", **changes)
    objective = settings(temperature=0.7, top_p=0.9, max_completion_length=16)
    lorakit.train(made, data=ROWS, objective=objective, quiet=True)
    gaps = logged(tmp_path / "run", "sampling/sampling_logp_difference/max")
    assert len(gaps) == 4
    assert max(gaps) <= (2e-2 if "dtype" in changes else 1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param({"beta": 0.1, "loss_type": "gspo"}, id="gspo"),
        pytest.param({"entropy_coef": 0.01, "top_entropy_quantile": 0.5}, id="entropy"),
    ],
)
def test_a_step_is_the_same_in_one_pass_and_in_several(
    attentive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: dict[str, Any],
):
    """Groups have a pass of their own, or are divided among several; norms round to float32.

    A step of SGD is as long as its gradient, which AdamW would hide.
    """
    passes: list[int] = []
    loss = Grpo.loss

    def noted(self: Grpo, forward: Any, batch: Any) -> Any:
        passes.append(len(batch[f"{PREFIX}lengths"]))
        return loss(self, forward, batch)

    monkeypatch.setattr(Grpo, "loss", noted)
    found, largest = {}, []
    for tokens in (1, 120, 10**6):
        monkeypatch.setitem(trainer.PASS_TOKENS, "cpu", tokens)
        folder, training = (
            tmp_path / str(tokens),
            {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd"},
        )
        made = recipe(attentive_folder, folder, dtype="float64", training=training)
        made["data"] = {"eval": 0}
        lorakit.train(made, data=ROWS, objective=settings(**objective), quiet=True)
        names = ("loss", "reward", "entropy", "kl", "grad_norm", "frac_reward_zero_std")
        found[tokens] = [logged(folder, name) for name in names], weights(folder)
        largest.append(max(passes))
        passes.clear()
    assert largest == [1, 2, 16]
    curves, learned = found.pop(10**6)
    for others, own in found.values():
        assert others == [pytest.approx(curve, abs=1e-7) for curve in curves]
        assert all(torch.allclose(own[k], learned[k], rtol=0, atol=1e-7) for k in learned)


def test_a_run_that_has_stopped_within_a_rollout_resumes_to_the_same_bytes(
    attentive_folder: Path, tmp_path: Path
):
    """Of four batches that are sampled together and learned twice, two make a step."""
    folder = tmp_path / "run"
    training = {"gradient_accumulation_steps": 2, "save_steps": 1, "save_total_limit": None}
    training |= {"max_steps": 7, "per_device_train_batch_size": 1}
    made = recipe(attentive_folder, folder, training=training)
    objective = settings(steps_per_generation=4, num_iterations=2, beta=0.1)
    lorakit.train(made, data=ROWS, objective=objective, quiet=True)
    before = (folder / "adapter_model.safetensors").read_bytes()
    gaps = logged(folder, "sampling/sampling_logp_difference/max")
    assert len(gaps) == 2, "steps on the weights that have sampled"
    assert max(gaps) <= 1e-4
    for last in (6, 4, 1):
        for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
            (folder / name).unlink()
        for step in range(last + 1, 8):
            for file in (folder / f"checkpoint-{step}").iterdir():
                file.unlink()
        kept = [*(folder / f"checkpoint-{last}").glob("rollouts-*")]
        assert bool(kept) == bool(last % 4)
        lorakit.train(made, data=ROWS, objective=objective, resume=True, quiet=True)
        assert (folder / "adapter_model.safetensors").read_bytes() == before, last


@pytest.fixture
def sampling(attentive_folder: Path) -> tuple[Grpo, Any, LoraModel, list[Any]]:
    """An objective that has read its rows, the tokenizer, a model, and the rows."""
    objective = Grpo(**{k: v for k, v in settings().items() if k != "type"})
    tokenizer = AutoTokenizer.from_pretrained(attentive_folder)
    base = AutoModelForCausalLM.from_pretrained(attentive_folder, dtype=torch.float32)
    model = LoraModel(base, LoraConfig(r=4, target_modules=["q_proj"]))
    from lorakit.data.formats import PROMPT
    from lorakit.data.sources import Row
    from lorakit.rewards.rewards import Rewards

    objective.rewards = Rewards.opened([vowels])
    samples = [PROMPT.sample(Row(row, Path("rows"), i)) for i, row in enumerate(ROWS)]
    rows = [objective.tokenize(sample, tokenizer, 200) for sample in samples]
    return objective, tokenizer, model, [*objective.together(rows, 200)]


def test_completions_are_the_same_however_a_step_is_divided(sampling: Any):
    objective, tokenizer, model, rows = sampling
    kept: list[CompletionGroup] = []

    def collate(some: Sequence[Any]) -> dict[str, torch.Tensor]:
        kept.extend(one for one in some if isinstance(one, CompletionGroup))
        return objective.to_batch(some, lambda rows: {})

    def groups(step: int, *batches: Any) -> list[list[list[int]]]:
        kept.clear()
        rollouts = Rollouts(objective, tokenizer, collate)
        rollouts.put_into([collate(some) for some in batches], model, step)
        return [[part.input_ids for part in group.parts] for group in kept]

    whole = groups(3, rows[:4])
    assert groups(3, rows[:2], rows[2:4]) == whole
    assert [*groups(3, rows[:1]), *groups(3, rows[1:4])] == whole
    assert groups(4, rows[:4]) != whole
    [first, second] = groups(3, [rows[0], rows[0]])
    assert first == whole[0]
    assert second != first, "the same prompt again gets other completions"
    assert len({tuple(one) for one in first}) > 1


def test_groups_without_signal_are_replaced_by_further_prompts(
    attentive_folder: Path, tmp_path: Path
):
    def of_even_rows(completions: Sequence[str], n: list[int], **_: Any) -> list[float]:
        return [i % 2 and len(text) for i, text in zip(n, completions, strict=True)]

    found = {}
    for name, dynamic in (("plain", False), ("dynamic", True)):
        made = recipe(attentive_folder, tmp_path / name, data={"eval": 0})
        objective = settings(rewards=[of_even_rows], dynamic_sampling=dynamic)
        lorakit.train(made, data=ROWS, objective=objective, quiet=True)
        shares = logged(tmp_path / name, "frac_reward_zero_std")
        found[name] = sum(shares) / len(shares)
    assert found["dynamic"] < found["plain"]
    assert sum(logged(tmp_path / "dynamic", "groups_resampled")) > 0


def test_a_reward_that_fails_is_named_and_one_that_always_fails_ends_the_run(
    attentive_folder: Path, tmp_path: Path
):
    def of_odd_rows(completions: Sequence[str], n: list[int], **_: Any) -> list[float | None]:
        if any(i == 4 for i in n):
            raise KeyError("four")
        return [None if i % 2 == 0 else len(text) for i, text in zip(n, completions, strict=True)]

    def never(completions: Sequence[str], **_: Any) -> list[float]:
        raise OSError("no service")

    made = recipe(attentive_folder, tmp_path / "some", training={"max_steps": 6}, data={"eval": 0})
    lorakit.train(made, data=ROWS, objective=settings(rewards=[of_odd_rows]), quiet=True)
    warned = [line for line in lines(tmp_path / "some" / "metrics.jsonl") if "warning" in line]
    assert any("four" in line["message"] and "train:5" in line["message"] for line in warned)
    made = recipe(attentive_folder, tmp_path / "all", data={"eval": 0})
    with pytest.raises(LorakitError, match="no service"):
        lorakit.train(made, data=ROWS, objective=settings(rewards=[never]), quiet=True)


def test_a_run_whose_rewards_never_differ_says_so_and_fails(attentive_folder: Path, tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        "def one(completions, **k):\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = recipe(attentive_folder, Path("run"), data={"train": "rows.jsonl", "eval": 0})
    made["objective"] = settings(rewards=["rewards.py:one"], num_generations=2)
    made["training"] |= {"max_steps": 3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    done = run_lorakit(tmp_path, "train", "recipe.yaml")
    assert done.returncode == 1
    warned = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "warning" in line]
    assert {"groups without signal", "unchanged"} <= {line["warning"] for line in warned}
    assert "lorakit rewards" in warned[-1]["cure"]


def test_the_best_by_held_out_reward_is_kept_and_stops_the_run(
    attentive_folder: Path, tmp_path: Path
):
    """A learning rate of next to nothing: the held-out reward is never better than at first."""
    training = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "learning_rate": 1e-9}
    training |= {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
    made = recipe(attentive_folder, tmp_path / "run", training=training)
    made["early_stopping_patience"] = 2
    lorakit.train(made, data=ROWS, objective=settings(), quiet=True)
    evaluated = [x for x in lines(tmp_path / "run" / "metrics.jsonl") if "eval_reward" in x]
    assert max(line["step"] for line in evaluated) == 3
    assert len({line["eval_reward"] for line in evaluated}) == 1


def test_the_reference_of_a_run_that_continues_an_adapter_is_that_adapter(
    attentive_folder: Path, tmp_path: Path
):
    made = recipe(attentive_folder, tmp_path / "first")
    lorakit.train(made, data=ROWS, objective=settings(), quiet=True)
    found = {}
    for name, start in (("start", {"adapter": str(tmp_path / "first")}), ("base", {})):
        more = recipe(attentive_folder, tmp_path / name, **start, training={"max_steps": 1})
        more.pop("lora")
        lorakit.train(more, data=ROWS, objective=settings(beta=0.5), quiet=True)
        [found[name]] = logged(tmp_path / name, "kl")
    assert found["start"] == pytest.approx(0, abs=1e-6)
    assert found["base"] == pytest.approx(0, abs=1e-6), "a new adapter begins as its base"
    again = recipe(attentive_folder, tmp_path / "more", adapter=str(tmp_path / "first"))
    again.pop("lora")
    lorakit.train(again, data=ROWS, objective=settings(beta=0.5), quiet=True)
    assert logged(tmp_path / "more", "kl")[-1] > 1e-4


BAD = {
    "num_generations": settings(num_generations=1),
    "weights": settings(weights=[1.0, 2.0]),
    "beta": settings(beta=-1),
    "loss_type": settings(loss_type="grop"),
    "rewards": settings(rewards=["nowhere.py:f"]),
    "steps_per_generation": settings(steps_per_generation=3),
    "epsilon_high": settings(loss_type="cispo"),
    "max_resamples": settings(max_resamples=2),
}


@pytest.mark.parametrize("key", BAD)
def test_a_setting_that_cannot_be_is_refused_by_name(
    key: str, attentive_folder: Path, tmp_path: Path
):
    training = {"gradient_accumulation_steps": 2}
    made = recipe(attentive_folder, tmp_path / "run", training=training)
    with pytest.raises(InputError, match=key):
        lorakit.train(made, data=ROWS, objective=BAD[key], quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [{"data": {"packing": True}}, {"data": {"streaming": True, "eval": 0}}, {"compile": True}],
)
def test_what_does_not_go_with_completions_is_refused(
    change: dict[str, Any], attentive_folder: Path, tmp_path: Path
):
    made = recipe(attentive_folder, tmp_path / "run", **change)
    with pytest.raises(InputError, match="grpo"):
        lorakit.train(made, data=ROWS, objective=settings(), quiet=True)


def test_the_command_checks_and_trains_with_rewards_of_a_file(
    attentive_folder: Path, tmp_path: Path
):
    (tmp_path / "rewards.py").write_text(
        "def far(completions, n, **columns):\n"
        "    return [text.count('a') + 0 * i for text, i in zip(completions, n)]\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = recipe(attentive_folder, Path("run"), data={"train": "rows.jsonl"})
    made["objective"] = settings(rewards=["rewards.py:far"], weights=[2.0])
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    done = run_lorakit(tmp_path, "check", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "forecast" in done.stdout + done.stderr
    done = run_lorakit(tmp_path, "train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "not read" not in done.stderr
    assert weights(tmp_path / "run")
    assert logged(tmp_path / "run", "rewards/far/mean")
