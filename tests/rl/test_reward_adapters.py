"""An adapter of objective reward as a reward: on the resident base as on a base of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.errors import InputError
from lorakit.evaluation.reward_scorer import reward_scorer
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.objectives.resident_reward import ResidentReward
from lorakit.report.completions import read_completions
from lorakit.rewards.reward_table import RewardInput

PAIRS = [
    {"prompt": f"Say {n}", "chosen": "a" * (2 + n % 3), "rejected": "zq" * (1 + n % 3)}
    for n in range(12)
]


def recipe(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "lora": {"r": 4},
        "training": {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1},
        "samples": 0,
        "output_dir": str(output),
        **more,
    }


@pytest.fixture(scope="module")
def reward(attentive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "run"
    made = recipe(attentive_folder, folder, data={"eval": 0}, objective="reward")
    lorakit.train(made, data=PAIRS, quiet=True)
    return folder


def test_scores_on_the_resident_base_are_those_on_a_base_of_its_own(
    reward: Path, attentive_folder: Path
):
    model, tokenizer = lorakit.load_model(attentive_folder, dtype="float32")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = LoraModel(model, config)
    own = ResidentReward(str(reward), "reward_0")
    own.attach(adapted, tokenizer)
    adapted.set_adapter("default")
    asked = [RewardInput("Say 1", "aaa"), RewardInput("Say something", "zq " * 9)]
    asked.append(RewardInput([{"role": "user", "content": "Say 2"}], "", where="x"))
    asked[2] = RewardInput(asked[2].prompt, [{"role": "assistant", "content": "b"}])
    expected = reward_scorer(reward, dtype="float32")(asked)
    assert own(asked) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert adapted.active_adapters == ["default"]
    assert not any(p.requires_grad for p in adapted.adapter_tensors("reward_0").values())
    assert len(set(expected)) == 3


def test_a_run_learns_from_a_reward_adapter_and_resumes(
    reward: Path, attentive_folder: Path, tmp_path: Path
):
    rows = [{"prompt": f"Say {n}"} for n in range(8)]
    objective = {
        "type": "grpo",
        "num_generations": 4,
        "max_completion_length": 6,
        "rewards": [{"adapter": str(reward)}],
    }
    made = recipe(attentive_folder, tmp_path / "run", data={"eval": 0.25})
    made["training"] |= {"max_steps": 2}
    found = lorakit.train(made | {"objective": objective}, data=rows, quiet=True)
    (fact,) = found.manifest.rewards
    assert fact["sha256"].keys() == {"adapter"}
    steps = read_completions(tmp_path / "run", [])
    assert len({v for one in steps for g in one.groups for v in g.reward}) > 4
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_what_is_no_reward_adapter_is_refused(reward: Path, tmp_path: Path):
    with pytest.raises(InputError, match="nowhere"):
        ResidentReward(str(tmp_path / "nowhere"), "reward_0")
    manifest = json.loads((reward / "lorakit.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in reward.iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    manifest["recipe"]["objective"] = {"type": "sft"}
    (other / "lorakit.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="no reward adapter"):
        ResidentReward(str(other), "reward_0")
