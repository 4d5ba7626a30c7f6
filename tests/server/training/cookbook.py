"""Recipes of tinker-cookbook, unchanged, as processes of their own against a service."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What recipes call the model: a folder of this name is in their working directory."""
KNOWN = "meta-llama/Llama-3.2-1B"
"""A name by which the plain loops, which take no renderer's name, know one."""


@dataclass
class Recipe:
    """A recipe that runs.

    Attributes:
        log: the folder of its metrics.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path

    def killed_after(self, steps: int, seconds: float = 300) -> None:
        """Kills it as soon as it has made so many steps."""
        metrics, deadline = self.log / "metrics.jsonl", time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
                break
            time.sleep(0.2)
        assert self.process.poll() is None, f"{self.name} has ended by itself"
        self.process.kill()
        self.process.communicate()

    def ended(self, seconds: float = 600) -> list[dict[str, Any]]:
        """Waits for its end, which must be a success. Returns its metrics, a step each."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
            raise AssertionError(f"{self.name} does not end:\n{output[-4000:]}") from None
        assert self.process.returncode == 0, f"{self.name}:\n{output[-6000:]}"
        lines = (self.log / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


class Workplace:
    """A folder in which recipes find the model and data sets by their names on the hub.

    Args:
        folder: an empty one.
        model: the folder of the base model that the service has.
        url: of the service.
    """

    def __init__(self, folder: Path, model: Path, url: str) -> None:
        self.folder, self.url = folder, url
        for name in (MODEL, KNOWN):
            link = folder / name
            link.parent.mkdir(parents=True)
            link.symlink_to(model)

    def write(self, path: str, rows: list[dict[str, Any]]) -> Path:
        """Writes rows as JSON Lines."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def start(
        self,
        recipe: str,
        log: str,
        key: str = "tml-local",
        url: str | None = None,
        **arguments: Any,
    ) -> Recipe:
        """Starts `python -m tinker_cookbook.recipes.RECIPE argument=value …`; None is left out."""
        given = {
            "model_name": MODEL,
            "renderer_name": "qwen3_instruct",
            "log_path": str(self.folder / log),
            "behavior_if_log_dir_exists": "delete",
            **arguments,
        }
        command = [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}"]
        environment = os.environ | {
            "TINKER_BASE_URL": url or self.url,
            "TINKER_API_KEY": key,
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        }
        process = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in given.items() if value is not None)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Recipe(f"{recipe} in {log}", process, self.folder / log)
