"""Adapter folders as `lorakit train` leaves them, made without training, always the same."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.manifest import Manifest, write_manifest
from lorakit.lora.checkpoint import PREFIX, write_adapter
from lorakit.lora.config import LoraConfig

KINDS = {
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (8, 24),
    "self_attn.v_proj": (8, 24),
    "self_attn.o_proj": (24, 24),
    "mlp.gate_proj": (40, 24),
    "mlp.up_proj": (40, 24),
    "mlp.down_proj": (24, 40),
}
TEMPLATE_SHA256 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
"""Of the bundled model's chat template, so that no notice tells of another one."""
_DATA = {"path": "orders.jsonl", "rows": 200, "sha256": "0f" * 32}


def paths(layers: int) -> list[str]:
    """Llama's modules, as they lie in a model of so many layers."""
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]


def save_factors(folder: Path, config: LoraConfig, layers: int = 2, decay: float = 1.0) -> None:
    """An adapter of larger updates in late layers, whose singular values fall by about `decay`.

    They fall faster where `decay` is below 1 and the layer is an early one.
    """
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path in paths(layers):
        layer, kind = int(path.split(".")[2]), path.split(".", 3)[3]
        d_out, d_in = KINDS[kind]
        r = config.rank_for(path)
        B = torch.linalg.qr(torch.randn(d_out, r, generator=generator)).Q
        A = torch.linalg.qr(torch.randn(d_in, r, generator=generator)).Q.T
        strength = (1 + layer / layers) * (2 if kind.endswith("v_proj") else 1)
        falling = decay ** (layers / (layer + 1))
        steps = falling ** torch.arange(min(A.shape[0], B.shape[1]), dtype=torch.float32)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = strength * B * steps
    write_adapter(folder, config, tensors)


def save_run(folder: Path, layers: int = 2, steps: int = 20, **more: Any) -> Path:
    """A whole run's folder: adapter, record, curves, movement and samples.

    Args:
        more: keys of `lorakit.json` that take the place of the usual ones, or join them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", base_model_name_or_path="tiny"
    )
    save_factors(folder, config, layers, decay=0.9)
    write_manifest(folder, Manifest.model_validate(_manifest(steps) | more))
    _save_metrics(folder, steps)
    _save_movement(folder, layers, steps)
    save_samples(
        folder,
        [("2 red mugs, please", '{"item": "mug"}', "Sure! Two mugs.", '{"item": "mug"}')],
    )
    return folder


def save_samples(folder: Path, rows: list[tuple[str, str, str, str]]) -> None:
    """`samples.json` of rows of prompt, reference, the base's answer and the adapter's."""
    samples = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "reference": reference,
            "base": base,
            "tuned": tuned,
        }
        for prompt, reference, base, tuned in rows
    ]
    (folder / "samples.json").write_text(json.dumps(samples, ensure_ascii=False))


def _manifest(steps: int) -> dict[str, Any]:
    split = {
        "rows": 180,
        "tokens": 21_400,
        "supervised": 6_300,
        "truncated": 3,
        "duplicates": 1,
        "empty_answers": 0,
        "lengths": {"min": 40, "p5": 62, "p25": 90, "p50": 118, "p75": 150, "p95": 210, "max": 256},
        "histogram": [[low, low + 24, 4 + (low * 7) % 31] for low in range(40, 256, 24)],
    }
    return {
        "base_model": "smollm2-135m-instruct",
        "recipe": {
            "model": "smollm2-135m-instruct",
            "data": {"train": "orders.jsonl", "eval": 0.1, "max_length": 256},
            "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            "training": {"max_steps": steps, "learning_rate": 2e-4},
            "output_dir": "runs/orders",
        },
        "data": [_DATA],
        "template_sha256": TEMPLATE_SHA256,
        "base_fingerprint": "cd" * 32,
        "steps": steps,
        "train_seconds": 83.4,
        "train_tokens": 64_200,
        "supervised_tokens": 18_900,
        "tokens_per_second": 769.8,
        "peak_memory_mb": 1874.0,
        "eval_loss": 0.412,
        "base_eval_loss": 2.731,
        "versions": {"python": "3.11.9", "lorakit": "0.1.0", "torch": "2.13.0"},
        "seed": 42,
        "data_statistics": {"train": split, "eval": split | {"rows": 20}},
        "notices": ["3 of 180 rows are longer than data.max_length and were cut"],
        "warnings": [],
        "advice": [{"key": "lora.r", "value": 8, "why": "6,300 learned tokens a row"}],
    }


def _save_metrics(folder: Path, steps: int) -> None:
    lines = []
    for step in range(1, steps + 1):
        loss = 0.4 + 2.4 * math.exp(-4 * step / steps) + 0.08 * math.sin(step * 2.4)
        line = {"step": step, "epoch": round(3 * step / steps, 4), "loss": round(loss, 4)}
        line |= {"grad_norm": round(0.3 + 2 / step, 5), "learning_rate": 2e-4 * (1 - step / steps)}
        line |= {"tokens_per_second": 760 + 20 * math.sin(step), "seconds": step * 4.1}
        lines.append(line)
        if step % max(1, steps // 4) == 0:
            lines.append({"step": step, "epoch": line["epoch"], "eval_loss": loss + 0.03})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _save_movement(folder: Path, layers: int, steps: int) -> None:
    modules = paths(layers)
    lines: list[dict[str, Any]] = [{"modules": modules, "weight_norm": [30.0 for _ in modules]}]
    for step in range(1, steps + 1, max(1, steps // 10)):
        grown = [
            round(0.02 * step / steps * (0.2 + 0.9 * (i % 7) / 7 + i / len(modules)), 6)
            for i in range(len(modules))
        ]
        lines.append({"step": step, "gradient_norm": [0.01] * len(modules), "update_norm": grown})
    (folder / "monitor.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def save_rewarded_run(folder: Path, steps: int = 40, held_out: int = 30) -> Path:
    """A whole run's folder as reinforcement learning leaves it, with two reward functions."""
    draw = random.Random(3)
    rewards = ["valid_json", "right_fields"]
    objective = {"type": "grpo", "rewards": [f"rewards.py:{name}" for name in rewards]}
    recipe = _manifest(steps)["recipe"] | {"objective": objective}
    save_run(folder, steps=steps, recipe=recipe, eval_loss=-0.8, base_eval_loss=-0.3)
    lines, completions = [], []
    for step in range(1, steps + 1):
        share = 0.2 + 0.7 * step / steps
        groups = []
        for prompt in range(4):
            where = f"orders.jsonl:{(step * 4 + prompt) % 24 + 1}"
            values: list[list[float | None]] = [
                [
                    float(draw.random() < share),
                    None if prompt == 3 else float(draw.random() < share),
                ]
                for _ in range(8)
            ]
            group: dict[str, Any] = {"where": where, "values": values}
            group["reward"] = [sum(x or 0 for x in row) for row in values]
            group |= {"tokens": [draw.randint(20, 60) for _ in values], "cut_off": 1}
            group["prompt"] = f"Order {where}"
            group["completion"] = f'{{"step": {step}}}' + " …" * draw.randint(0, 40)
            groups.append(group)
        completions.append({"step": step, "rewards": rewards, "groups": groups})
        gap = "sampling/sampling_logp_difference"
        lines.append(
            {
                "step": step,
                "loss": 0.01 * draw.random(),
                "reward": 2 * share,
                **{f"rewards/{name}/mean": share for name in rewards},
                "frac_reward_zero_std": 1 - share * (1 - share) * 4,
                "completions/mean_length": 60 - 30 * share,
                "completions/clipped_ratio": 0.1 * (1 - share),
                "entropy": 1.2 - share,
                f"{gap}/mean": 1e-7,
                f"{gap}/max": 2e-6 * (1 + draw.random()),
                "sampled_tokens_per_second": 300 + draw.random(),
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": -2 * share, "eval_reward": 2 * share})
    for name, found in (("metrics", lines), ("completions", completions)):
        text = "".join(f"{json.dumps(line)}\n" for line in found)
        (folder / f"{name}.jsonl").write_text(text)

    def measured(share: float) -> list[list[float]]:
        rows = [[float(draw.random() < share) for _ in rewards] for _ in range(held_out)]
        return [[*row, sum(row)] for row in rows]

    where = [f"orders.jsonl:{i}" for i in range(held_out)]
    states = {"base": measured(0.3), "tuned": measured(0.85)}
    held = {"rewards": rewards, "where": where, "states": states}
    (folder / "held_out_rewards.json").write_text(json.dumps(held))
    return folder
