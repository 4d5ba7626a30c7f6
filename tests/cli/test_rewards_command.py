"""`lorakit rewards`, and what people have reported of reward functions elsewhere."""

import json
from pathlib import Path

import pytest

from command import Command, Done

FUNCTIONS = """
import json

def valid_json(completions, **kwargs):
    found = []
    for text in completions:
        try:
            json.loads(text)
            found.append(1.0)
        except ValueError:
            found.append(0.0)
    return found

async def right(completions, answer, **kwargs):
    return [None if a is None else float(a in c) for c, a in zip(completions, answer)]

def _helper(completions):
    raise AssertionError

def other(x):
    raise AssertionError
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    rows = [
        {"prompt": f"{n} + {n}?", "completion": f"[{2 * n}]", "answer": str(2 * n) if n else None}
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def refused(done: Done) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "out.json").read_text())


def test_all_functions_of_a_file_are_tried_on_the_rows_own_answers(
    folder: Path, lorakit_command: Command
):
    done = lorakit_command("rewards", "rewards.py", "--data", "rows.jsonl", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    (trial,) = trials(folder)
    assert [one["name"] for one in trial["rewards"]] == ["valid_json", "right", "reward"]
    assert [one["mean"] for one in trial["rewards"]] == pytest.approx([1, 1, 11 / 6])
    assert [one["none"] for one in trial["rewards"]] == pytest.approx([0, 1 / 6, 0])
    assert trial["completions"][0]["rewards"] == {"valid_json": 1.0, "right": None}
    assert "valid_json" in done.stdout


def test_sampled_completions_are_tried_too_and_what_teaches_nothing_is_named(
    folder: Path, lorakit_command: Command, tiny_model: Path
):
    (folder / "rewards.py").write_text(
        "def distance(completions, **kwargs): return [abs(4 - len(c)) for c in completions]\n"
        "def never(completions, **kwargs): return [0] * len(completions)\n"
        "def none(completions, **kwargs): return [None] * len(completions)\n"
    )
    done = lorakit_command(
        *("rewards", "rewards.py:distance", "rewards.py:never", "rewards.py:none", "json"),
        *("--data", "rows.jsonl", "--model", tiny_model, "--samples", "4", "--prompts", "2"),
        *("--max-completion-length", "8", "--json", "out.json"),
    )
    assert done.returncode == 0, done.stderr
    own, sampled = trials(folder)
    assert len(own["completions"]) == 6
    assert len(sampled["completions"]) == 8
    assert [one["where"] for one in sampled["completions"][::4]] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert len({one["completion"] for one in sampled["completions"][:4]}) > 1
    assert sampled["rewards"][0]["signal"] > 0
    for name in ("never", "none"):
        assert any(line.startswith(f"{name} gave") for line in sampled["findings"])
    assert "distance gives the rows' own answers less" in done.stdout


def test_rewards_of_messages_are_asked_as_in_trl(folder: Path, lorakit_command: Command):
    row = {
        "messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "solution": "4",
    }
    (folder / "chat.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "chat.py").write_text(
        "def same(prompts, completions, solution, tools, **kwargs):\n"
        "    assert prompts == [[{'role': 'user', 'content': '2?'}]], prompts\n"
        "    assert tools[0][0]['function']['name'] == 'f'\n"
        "    return [float(c[0]['content'] == s) for c, s in zip(completions, solution)]\n"
    )
    done = lorakit_command("rewards", "chat.py", "--data", "chat.jsonl", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert trials(folder)[0]["rewards"][0]["mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rewards.py", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("rewards.py",), "--data"),
        (("rewards.py:valid", "--data", "rows.jsonl"), "no valid"),
        (("{regex: [}", "--data", "rows.jsonl"), "regex"),
        (("valid_jsn", "--data", "rows.jsonl"), "built in are"),
        (("my_lib.my_reward", "--data", "rows.jsonl"), "my_lib:my_reward"),  # trl 3448
        (("accuracy_reward", "--data", "rows.jsonl"), "trl.rewards:accuracy_reward"),
        (("rewards.py", "--data", "prompts.jsonl"), "--model"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], said: str, folder: Path, lorakit_command: Command
):
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    assert said in refused(lorakit_command("rewards", *arguments))


def test_the_rewards_rows_and_model_of_a_recipe_are_tried(
    folder: Path, lorakit_command: Command, tiny_model: Path
):
    recipe = {
        "model": str(tiny_model),
        "data": {"train": "rows.jsonl"},
        "objective": {
            "type": "grpo",
            "rewards": ["rewards.py:valid_json", {"length": 4}],
            "weights": [1.0, 0.5],
            "num_generations": 2,
            "max_completion_length": 4,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = lorakit_command(
        *("rewards", "recipe.yaml", "objective.num_generations=3", "--prompts", "2"),
        *("--json", "out.json"),
    )
    assert done.returncode == 0, done.stderr
    own, sampled = trials(folder)
    assert [one["name"] for one in own["rewards"]] == ["valid_json", "length", "reward"]
    assert len(sampled["completions"]) == 6
    for one in sampled["completions"]:
        given = one["rewards"]
        assert one["reward"] == pytest.approx(given["valid_json"] + 0.5 * given["length"])
    assert "has no rewards" in refused(
        lorakit_command("rewards", "recipe.yaml", "objective=sft", "--data", "rows.jsonl")
    )


# --- reported elsewhere ---------------------------------------------------------------------------


def tried(
    folder: Path,
    command: Command,
    source: str,
    *rewards: str,
    rows: str = "rows.jsonl",
    timeout: float = 2,
) -> tuple[Done, dict]:
    (folder / "rewards.py").write_text(source)
    named = rewards or ("rewards.py",)
    done = command(
        *("rewards", *named, "--data", rows, "--timeout", str(timeout), "--json", "out.json"),
    )
    assert done.returncode == 0, done.stderr
    return done, trials(folder)[0]


def test_a_function_for_one_task_among_several_gives_none_for_the_others(folder, lorakit_command):
    """huggingface/trl 3079, modelscope/ms-swift 8123"""
    source = (
        "def math(completions, answer, **kwargs):\n"
        "    return [1.0 if a == '2' else None for a in answer]\n"
        "def nan(completions, **kwargs):\n"
        "    return [float('nan')] + [1.0] * (len(completions) - 1)\n"
    )
    _, trial = tried(folder, lorakit_command, source)
    math, nan, total = trial["rewards"]
    assert (math["mean"], math["none"]) == (1, pytest.approx(5 / 6))
    assert nan["mean"] == 1
    assert total["none"] == pytest.approx(1 / 6)
    (problem,) = trial["problems"]
    assert (problem["name"], problem["where"], problem["count"]) == ("nan", "rows.jsonl:1", 1)


def test_a_column_that_a_function_needs_and_rows_lack_is_named(folder, lorakit_command):
    """2U1/Qwen-VL-Series-Finetune 234, OpenRLHF's and verl's signatures"""
    for parameter, said in (("assistant", "answer"), ("queries", "OpenRLHF")):
        source = f"def accuracy(completions, {parameter}, **kwargs): return [1]"
        (folder / "rewards.py").write_text(source)
        line = refused(lorakit_command("rewards", "rewards.py", "--data", "rows.jsonl"))
        assert parameter in line
        assert said in line


def test_a_function_for_messages_on_rows_of_text_is_told_so(folder, lorakit_command):
    """unslothai/unsloth 2907, huggingface/trl 4202"""
    source = "def f(completions, **kwargs): return [len(c[0]['content']) for c in completions]"
    done, trial = tried(folder, lorakit_command, source)
    assert "completions are texts here" in trial["problems"][0]["cause"]
    assert trial["problems"][0]["count"] == 6
    assert "completions are texts here" in done.stdout


def test_files_in_packages_and_processes_of_a_reward_work(folder, lorakit_command):
    """axolotl-ai-cloud/axolotl 2557, verl-project/verl 1293, 2680, 3150"""
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scores.py").write_text("def score(text): return float(len(text))\n")
    (package / "code.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from .scores import score\n"
        "def length(completions, **kwargs):\n"
        "    with ProcessPoolExecutor(2, get_context('spawn')) as pool:\n"
        "        return list(pool.map(score, completions))\n"
        "def length_here(completions, **kwargs):\n"
        "    return [score(c) for c in completions]\n"
    )
    named = ("package/code.py:length", "package.code:length_here")
    (folder / "own.py").write_text("")
    done = lorakit_command(
        *("rewards", *named, "--data", "rows.jsonl", "--timeout", "20", "--json", "out.json")
    )
    assert done.returncode == 0, done.stderr
    first, second, _ = trials(folder)[0]["rewards"]
    assert first["mean"] == second["mean"] > 0


def test_a_test_run_that_hangs_is_ended_with_what_it_has_started(folder, lorakit_command):
    """verl-project/verl 7254 and 1466, rllm-org/rllm 915"""
    source = (
        "import pathlib, subprocess\n"
        "def run(completions, **kwargs):\n"
        "    if any('[4]' in c for c in completions):\n"
        "        child = subprocess.Popen(['sleep', '60'])\n"
        "        with pathlib.Path('pids').open('a') as file:\n"
        "            file.write(f'{child.pid}\\n')\n"
        "        child.wait()\n"
        "    return [1.0] * len(completions)\n"
    )
    _, trial = tried(folder, lorakit_command, source, timeout=0.5)
    (problem,) = trial["problems"]
    assert (problem["where"], problem["count"]) == ("rows.jsonl:3", 1)
    for pid in (folder / "pids").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_mathematics_that_hangs_costs_its_row_alone(folder, lorakit_command):
    """areal-project/AReaL 1426, Tencent-Hunyuan/UniRL 462, huggingface/trl 5281"""
    answers = [r"\boxed{4}", r"\boxed{10^{10^{10^{10}}}}", r"\boxed{5}"]
    rows = [{"prompt": "2 + 2?", "completion": a, "solution": "4"} for a in answers]
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, trial = tried(folder, lorakit_command, "", "math_verify", rows="math.jsonl")
    given = [one["rewards"]["math_verify"] for one in trial["completions"]]
    assert (given[0], given[2]) == (1, 0)
    assert given[1] in (0, None)


def test_partial_functions_objects_and_equal_names_have_names(folder, lorakit_command):
    """huggingface/trl 6133, huggingface/open-r1 230"""
    source = (
        "from functools import partial\n"
        "def length(completions, n=1, **kwargs): return [n * len(c) for c in completions]\n"
        "twice = partial(length, n=2)\n"
        "class Near:\n"
        "    def __call__(self, completions, **kwargs): return [1.0] * len(completions)\n"
        "near = Near()\n"
        "short = lambda completions, **kwargs: [-len(c) for c in completions]\n"
    )
    _, trial = tried(folder, lorakit_command, source)
    names = [one["name"] for one in trial["rewards"]]
    assert names == ["length", "twice", "Near", "near", "short", "reward"]
    _, trial = tried(folder, lorakit_command, source, "rewards.py:length", "rewards.py:length")
    assert [one["name"] for one in trial["rewards"]][:2] == ["length", "length_2"]


def test_a_reward_that_changes_with_the_step_can_be_tried(folder, lorakit_command):
    """modelscope/ms-swift 4192"""
    source = (
        "def f(completions, trainer_state, **kwargs):\n"
        "    share = trainer_state.global_step / max(1, trainer_state.max_steps)\n"
        "    return [share + trainer_state.epoch] * len(completions)\n"
    )
    _, trial = tried(folder, lorakit_command, source)
    assert trial["rewards"][0]["mean"] == 0


def test_reasoning_that_the_prompt_opens_is_recognised(folder, lorakit_command):
    """huggingface/trl 6966, huggingface/open-r1 560"""
    rows = [{"prompt": "2?", "completion": f"so {n}</think>{n}"} for n in range(3)]
    (folder / "think.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, trial = tried(folder, lorakit_command, "", "format", rows="think.jsonl")
    assert trial["rewards"][0]["mean"] == 0
    assert "opened: true" in trial["findings"][0]
    opened = "{type: format, opened: true}"
    _, trial = tried(folder, lorakit_command, "", opened, rows="think.jsonl")
    assert trial["rewards"][0]["mean"] == 1


def test_columns_with_the_names_of_arguments_are_refused_and_others_are_given(
    folder, lorakit_command
):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b", "completions": 1}\n')
    line = refused(lorakit_command("rewards", "json", "--data", "bad.jsonl"))
    assert "bad.jsonl:1" in line
    assert "completions" in line
    row = {"prompt": "a", "completion": "b", "tests": [[1, 2], [3]], "info": {"a": [None]}}
    (folder / "nested.jsonl").write_text(json.dumps(row) + "\n")
    source = (
        "def f(completions, tests, info, **kwargs):\n"
        "    return [float(tests[0] == [[1, 2], [3]] and info[0] == {'a': [None]})]\n"
    )
    _, trial = tried(folder, lorakit_command, source, rows="nested.jsonl")
    assert trial["rewards"][0]["mean"] == 1
