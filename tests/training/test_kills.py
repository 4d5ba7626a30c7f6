"""A run that is killed again and again, at moments that nobody chose, ends in the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import lorakit
from small_runs import recipe

# Imports once and then forks, so that starting again takes no time.
DRIVER = """
import json, os, random, signal, sys, time
import psutil
from pathlib import Path
import lorakit.training.run as run
import lorakit.training.setup, transformers.trainer, transformers.models.llama.modeling_llama

values, seed = json.loads(sys.argv[1]), int(sys.argv[2])
folder, moments = Path(values["output_dir"]), random.Random(seed)
kills = while_saving = 0
while True:
    child = os.fork()
    if child == 0:
        run.train(values, resume=True, quiet=True)
        os._exit(0)
    limit = moments.uniform(0.1, 1.5) + 0.1 * kills  # of its own time, however busy the machine
    while sum(psutil.Process(child).cpu_times()[:2]) < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            print(json.dumps({"kills": kills, "while_saving": while_saving}))
            sys.exit(0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    while_saving += (folder / ".saving").exists()
"""


def test_whenever_a_run_is_killed_it_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "killed", max_steps=40, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(values), "7"], capture_output=True, text=True
    )
    assert driver.returncode == 0, driver.stderr
    seen = json.loads(driver.stdout.splitlines()[-1])
    assert seen["kills"] >= 3, seen

    undisturbed = lorakit.train(values | {"output_dir": str(tmp_path / "undisturbed")}, quiet=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (undisturbed.output_dir / name).read_bytes()
    for file in ("metrics.jsonl", "monitor.jsonl"):
        steps = [
            [json.loads(line)["step"] for line in (folder / file).read_text().splitlines()]
            for folder in (tmp_path / "killed", undisturbed.output_dir)
        ]
        assert steps[0] == steps[1], file
    assert not (tmp_path / "killed" / ".saving").exists()
