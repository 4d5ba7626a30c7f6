"""Reward functions of files, modules and Python: how they are called, and what fails."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lorakit.errors import InputError, LorakitError
from lorakit.rewards.reward_table import RewardInput
from lorakit.rewards.rewards import Rewards


def asked(*completions: object, **columns: list) -> list[RewardInput]:
    return [
        RewardInput(
            "a question",
            completion,
            [1] * len(completion),
            {name: values[i] for name, values in columns.items()},
            f"rows.jsonl:{i + 1}",
        )
        for i, completion in enumerate(completions)
    ]


@pytest.fixture
def opened(tmp_path: Path):
    """Writes a file of functions and opens rewards of it."""
    every = []

    def open_them(source: str, *names: str, **options: object) -> Rewards:
        (tmp_path / "rewards.py").write_text(source, encoding="utf-8")
        specs = [f"rewards.py:{name}" for name in names] or ["rewards.py"]
        every.append(Rewards.opened(specs, folder=tmp_path, **options))
        return every[-1]

    yield open_them
    for rewards in every:
        rewards.close()


def values(rewards: Rewards, inputs: list[RewardInput]) -> list[list[float | None]]:
    table = rewards(inputs)
    return [[None if x != x else x for x in row] for row in table.values.tolist()]


def test_functions_get_what_trl_gives_them_and_columns_by_name(opened, tmp_path):
    (tmp_path / "neighbour.py").write_text("def length(text): return len(text)")
    rewards = opened(
        "import asyncio\n"
        "import neighbour\n"
        "def everything(prompts, completions, completion_ids, answer, **kwargs):\n"
        "    assert kwargs['trainer_state'].global_step == 7\n"
        "    kwargs['log_metric']('tokens', sum(map(len, completion_ids)))\n"
        "    kwargs['log_extra']('seen', answer)\n"
        "    completions.clear()\n"
        "    return [float(a) for a in answer]\n"
        "def named(completions):\n"
        "    return [neighbour.length(c) for c in completions]\n"
        "async def later(completions, answer):\n"
        "    await asyncio.sleep(0)\n"
        "    return [None if a == 1 else True for a in answer]\n",
        *("everything", "named", "later"),
        weights=[1, 0.5, 2],
    )
    rewards.check(["answer"])
    table = rewards(asked("ab", "abc", answer=[1, 2]), {"global_step": 7})
    expected = torch.tensor([[1.0, 2.0, torch.nan], [2.0, 3.0, 1.0]], dtype=torch.float64)
    assert torch.equal(table.values.nan_to_num(-9), expected.nan_to_num(-9))
    assert table.values.dtype == torch.float64
    assert table.totals.tolist() == [2.0, 5.5]
    assert table.metrics == {"tokens": 5}
    assert table.extra == {"seen": [1, 2]}
    assert not table.problems
    facts = rewards.facts()
    assert set(facts[0]["sha256"]) == {"rewards.py", "neighbour.py"}


@pytest.mark.parametrize(
    ("returned", "expected", "problem"),
    [
        ("[1, None]", [1.0, None], None),
        ("(True, False)", [1.0, 0.0], None),
        ("numpy.array([1, 2], dtype='float32')", [1.0, 2.0], None),
        ("[numpy.float32(0.5), numpy.int64(2)]", [0.5, 2.0], None),
        ("(x for x in (1, 2))", [1.0, 2.0], None),
        ("[decimal.Decimal('0.5'), fractions.Fraction(1, 4)]", [0.5, 0.25], None),
        ("[float('nan'), 1]", [None, 1.0], "NaN"),
        ("[1, -float('inf')]", [1.0, None], "-Inf"),
        ("['1.0', 2]", [None, 2.0], "a str ('1.0')"),
        ("[[1.0], 2]", [None, 2.0], "a list ([1.0])"),
        ("[1]", [None, None], "1 rewards for 2 completions"),
        ("0.5", [None, None], "a float (0.5)"),
        ("None", [None, None], "it returned None"),
        ("{'a': 1, 'b': 2}", [None, None], "a dict"),
        ("1 / 0", [None, None], "ZeroDivisionError"),
        ("sys.exit(3)", [None, None], "exit(3)"),
    ],
)
def test_each_kind_of_value_has_its_rule(returned, expected, problem):
    import decimal
    import fractions

    import numpy

    names = {"numpy": numpy, "decimal": decimal, "fractions": fractions, "sys": sys}

    def function(completions, **kwargs):
        # One completion alone is asked only after a failure.
        value = eval(returned, names)
        return value if len(completions) == 2 else 1 / 0

    with Rewards.opened([function]) as rewards:
        table = rewards(asked("a", "b"))
    assert [None if x != x else x for x in table.values[:, 0].tolist()] == expected
    failed = [one for one in table.problems if one.name]
    if problem is None:
        assert not failed
    else:
        (found,) = failed
        assert problem in found.cause
        assert found.count == expected.count(None)
        assert found.where in found.line


def test_the_row_on_which_a_function_fails_is_named_and_the_others_keep_their_rewards(opened):
    rewards = opened(
        "import json\n"
        "def total(completions, **kwargs):\n"
        "    found = [json.loads(c) for c in completions]\n"
        "    return [x / sum(found) for x in found]\n"
    )
    table = rewards(asked("1", "{", "3"))
    assert values(rewards, asked("1", "{", "3")) == [[0.25], [None], [0.75]]
    (problem,) = table.problems
    assert (problem.name, problem.where, problem.count) == ("rewards", "rows.jsonl:2", 1)
    assert "JSONDecodeError" in problem.cause
    assert "rewards.py, line 3" in problem.cause


def test_a_function_that_hangs_in_c_or_ends_its_process_is_named_and_the_others_go_on(opened):
    rewards = opened(
        "import os, re\n"
        "def pattern(completions, **kwargs):\n"
        "    return [float(bool(re.match(r'(a+)+$', c))) for c in completions]\n"
        "def leaves(completions, **kwargs):\n"
        "    if 'leave' in completions:\n"
        "        os._exit(5)\n"
        "    return [len(c) for c in completions]\n"
        "def fine(completions, **kwargs):\n"
        "    return [1] * len(completions)\n",
        *("pattern", "leaves", "fine"),
        timeout=0.5,
    )
    begun = time.monotonic()
    table = rewards(asked("aa", "a" * 40 + "b", "leave"))
    assert time.monotonic() - begun < 20
    found = table.values.nan_to_num(-1).tolist()
    assert found == [[1, 2, 1], [-1, 41, 1], [0, -1, 1]]
    causes = {problem.name: problem for problem in table.problems}
    assert "limit of time" in causes["pattern"].cause
    assert "rewards.py, line 3" in causes["pattern"].cause
    assert causes["pattern"].where == "rows.jsonl:2"
    assert "exit code 5" in causes["leaves"].cause
    assert causes["leaves"].where == "rows.jsonl:3"


def test_async_functions_wait_together_and_one_that_hangs_leaves_the_others(opened):
    rewards = opened(
        "import asyncio\n"
        "lock = asyncio.Lock()\n"
        "async def one(completions, **kwargs):\n"
        "    await asyncio.sleep(0.4)\n"
        "    async with lock:\n"
        "        return [1] * len(completions)\n"
        "async def other(completions, **kwargs):\n"
        "    await asyncio.sleep(0.4)\n"
        "    return [2] * len(completions)\n"
        "async def never(completions, **kwargs):\n"
        "    await asyncio.Event().wait()\n",
        *("one", "other", "never"),
        timeout=2,
    )
    for _ in range(2):  # a lock or a client belongs to one event loop
        begun = time.monotonic()
        table = rewards(asked("a"))
        assert table.values.nan_to_num(-1).tolist() == [[1, 2, -1]]
        assert time.monotonic() - begun < 4
    assert table.seconds["one"] + table.seconds["other"] < 1.5


def test_a_function_from_python_that_waits_forever_is_interrupted():
    def waits(completions, **kwargs):
        time.sleep(60)

    async def waits_too(completions, **kwargs):
        import asyncio

        await asyncio.sleep(60)

    begun = time.monotonic()
    with Rewards.opened([waits, waits_too], timeout=0.3) as rewards:
        table = rewards(asked("a"))
    assert time.monotonic() - begun < 20
    assert [problem.name for problem in table.problems] == ["waits", "waits_too"]


def test_a_function_that_fails_three_times_in_a_row_stops_the_run(opened):
    rewards = opened("def wrong(completions, **kwargs):\n    return undefined\n")
    for _ in range(2):
        assert rewards(asked("a", "b")).problems[0].count == 2
    with pytest.raises(LorakitError, match=r"NameError.*undefined") as error:
        rewards(asked("a"))
    assert error.value.exit_code == 1
    rewards.stops = False
    rewards(asked("a"))


def test_names_are_unique_and_weights_fit(tmp_path):
    for file in ("one.py", "two.py"):
        (tmp_path / file).write_text("def good(completions): return [1] * len(completions)")
    given = ["one.py:good", "two.py:good", lambda completions: [2], partial(max, 1)]
    with Rewards.opened(given, folder=tmp_path) as rewards:
        assert rewards.names == ("good", "good_2", "lambda", "max")
        assert rewards.weights == (1, 1, 1, 1)
    for weights in ([1], [1, float("nan")], [0, 0], ["1", 2], 3):
        with pytest.raises(InputError, match="weights"):
            Rewards.opened(given[:2], weights, folder=tmp_path)


@pytest.mark.parametrize(
    ("spec", "source", "said"),
    [
        ("rewards.py:good", "def god(completions): ...", "did you mean 'god'"),
        ("rewards.py", "def a(completions): ...\ndef b(completions): ...", "a, b"),
        ("rewards.py", "import numpy as np", "rewards.py:NAME"),
        ("rewards.py:good", "import nowhere", "ModuleNotFoundError.*line 1"),
        ("rewards.py:good", "def good(:", "line 1"),
        ("rewards.py:good", "import sys; sys.exit(1)", r"exit\(1\)"),
        ("rewards.py:good", "import os; os._exit(4)", "exit code 4"),
        ("rewards.py:good", "good = 3", "an? int"),
        ({"type": "rewards.py:good", "size": 3}, "def good(completions): ...", "no parameter size"),
        ("other.py:good", "", "no file other.py"),
        ("nowhere:good", "", "nowhere"),
        ("exact", "", "did you mean|built in are"),
        ({"type": "regex", "patern": "a"}, "", "did you mean 'pattern'"),
        ({"regex": "("}, "", "regex"),
        ({"type": "overlong"}, "", "max_completion_len"),
        ({"json_schema": {"type": "nothing"}}, "", "schema"),
        ({"adapter": "runs/reward"}, "", "needs a model"),
        ([], "", "at least one"),
        (3, "", "rewards"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(spec, source, said, tmp_path):
    (tmp_path / "rewards.py").write_text(source)
    with pytest.raises(InputError, match=said):
        Rewards.opened(spec, folder=tmp_path)


def test_columns_are_checked_before_a_run(opened):
    rewards = opened("def f(completions, solution, tone='a', *, mood): ...")
    with pytest.raises(InputError, match="needs the column solution"):
        rewards.check(["mood", "answer"])
    with pytest.raises(InputError, match=r"did you mean 'solution'|needs the column"):
        rewards.check(["mood", "solutions"])
    with pytest.raises(InputError, match="completions has the name of an argument"):
        rewards.check(["mood", "solution", "completions"], "rows.jsonl")
    rewards.check(["mood", "solution"])


def test_a_row_without_a_column_has_none_there(opened):
    rewards = opened("def f(completions, a): return [None if x is None else x for x in a]")
    rewards.check(["a"])
    one, other = asked("x", "y", a=[1, 2])
    assert values(rewards, [one, RewardInput("q", "y")]) == [[1], [None]]
    assert values(rewards, [RewardInput("q", "y")]) == [[None]]
    assert "every function gave None" in rewards([RewardInput("q", "y")]).problems[0].line
    assert values(rewards, [other]) == [[2]]


def test_classes_and_modules_give_rewards_too(tmp_path, monkeypatch):
    (tmp_path / "scores.py").write_text(
        "class Near:\n"
        "    def __init__(self, target=1): self.target = target\n"
        "    def __call__(self, completions, **kwargs):\n"
        "        return [-abs(len(c) - self.target) for c in completions]\n"
        "def times(completions, factor, **kwargs): return [len(c) * factor for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    specs = [
        {"type": "scores:Near", "target": 3, "name": "near"},
        {"type": "scores.py:times", "factor": 2},
    ]
    with Rewards.opened(specs, folder=tmp_path) as rewards:
        assert rewards.names == ("near", "times")
        assert values(rewards, asked("ab")) == [[-1, 4]]


def test_a_reward_adapter_is_opened_by_who_has_the_model():
    def scorer(path: str):
        assert path == "runs/reward"
        return lambda asked: [float(len(one.completion)) for one in asked]

    with Rewards.opened([{"adapter": "runs/reward"}], scorer=scorer) as rewards:
        assert rewards.names == ("adapter",)
        assert values(rewards, asked("ab", "c")) == [[2], [1]]


_KILLED = """
import sys, time
from lorakit.rewards.reward_arguments import RewardCall
from lorakit.rewards.reward_process import RewardProcess
process = RewardProcess("file", sys.argv[1], [("f", {})])
process.ask([0], RewardCall(["p"], ["c"], [[1]], {}), 60)
"""


def test_no_process_is_left_when_its_parent_is_killed(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "import os, pathlib, time\n"
        f"place = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "def f(completions):\n"
        "    place.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    place.with_suffix('.new').rename(place)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", _KILLED, str(file)])
    limit = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _runs(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
