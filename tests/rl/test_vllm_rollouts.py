"""vLLM samples with each step's adapter: its command line, what is refused, and a real server."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.errors import InputError, LorakitError
from lorakit.objectives.policy_gradient import truncated_ratio
from lorakit.rl.vllm_server import VllmServer, VllmServerOptions, command
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from small_runs import lines, save_sums, weights
from tiny import make_attentive, save_tiny_model

ROWS = [{"prompt": f"{n} + {n}?"} for n in range(8)]


def recipe(model: Path, output: Path, **objective: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "data": {"eval": 0.25},
        "lora": {"r": 4},
        "objective": {
            "type": "grpo",
            "rollouts": "vllm",
            "rewards": [{"type": "length", "target": 6, "unit": "characters"}],
            "num_generations": 4,
            "max_completion_length": 8,
            **objective,
        },
        "training": {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2},
        "samples": 0,
        "output_dir": str(output),
    }


def test_the_command_line_needs_no_vllm(tiny_model: Path):
    made = command(VllmServerOptions(str(tiny_model), 12, "bfloat16", 256, 0.4, 2), 8123)
    line = " ".join(made.command)
    assert line.startswith(f"vllm serve {tiny_model} --served-model-name=base --enable-lora")
    for part in (
        "--max-lora-rank 16",
        "--logprobs-mode processed_logprobs",
        "--max-model-len 256",
        "--gpu-memory-utilization 0.4",
        "--tensor-parallel-size 2",
        "--port 8123",
    ):
        assert part in line
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    with pytest.raises(InputError, match="rank 512"):
        command(VllmServerOptions(str(tiny_model), 1000), 8000)


def test_the_command_of_a_run_is_among_its_notices(tiny_model: Path, tmp_path: Path):
    save_sums(tmp_path / "rows.jsonl")
    values = recipe(tiny_model, tmp_path / "run")
    values["data"] |= {"train": str(tmp_path / "rows.jsonl")}
    setup = set_up(load_recipe(values))
    setup.close()
    [shown] = [line for line in setup.notices if "vllm serve" in line]
    assert f"vllm serve {tiny_model}" in shown
    assert "--max-lora-rank 8" in shown


def test_a_run_without_vllm_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pip install vllm"):
        lorakit.train(recipe(tiny_model, tmp_path / "run"), data=ROWS, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"num_iterations": 2},
        {"environment": "env.py:X"},
        {"rollouts": "engine", "vllm_server_base_url": "http://x"},
    ],
)
def test_what_does_not_go_with_vllm_is_refused(tiny_model: Path, changes: dict[str, Any]):
    with pytest.raises(InputError, match=r"vllm|rollouts"):
        lorakit.train(recipe(tiny_model, Path("run"), **changes), data=ROWS, quiet=True)


def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(LorakitError, match="does not answer"):
        VllmServer("http://127.0.0.1:9", 2).base_name()


def test_ratios_to_the_sampler_are_truncated():
    own, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -4.0, -1.0])
    found = truncated_ratio(own, sampled, 3.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, torch.tensor(-2.0).exp()]))


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")
def test_a_run_on_a_real_server_learns_from_each_steps_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With vLLM's build for CPUs in an environment of its own: put its folder bin on the PATH."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    model = save_tiny_model(tmp_path / "model", hidden_size=128)  # heads of a size that it takes
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    make_attentive(base)
    base.save_pretrained(model)
    run, made = tmp_path / "run", recipe(model, tmp_path / "run", temperature=0.7)
    made["training"] |= {"max_steps": 2, "learning_rate": 2e-2}
    # Of all ratios to vLLM, which are about 1, one half is left.
    made["objective"] |= {"vllm_importance_sampling_clip_max": 0.5, "vllm_max_model_length": 128}
    found = lorakit.train(made, data=ROWS, quiet=True).manifest
    logged = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert len(logged) == 2
    # An adapter of the step before, or none, has other log-probabilities.
    for line in logged:
        assert 0 < line["sampling/sampling_logp_difference/max"] < 2e-3
    assert found.eval_scores is not None
    assert any("vllm serve" in line for line in found.notices)
    learned = weights(run)
    assert max(tensor.abs().max() for name, tensor in learned.items() if "lora_B" in name) > 0.01
