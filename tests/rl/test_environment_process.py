"""An environment has a process for each conversation, and whatever it does, it is alone in that."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import InputError
from lorakit.rl.environment_process import (
    EnvironmentFailedError,
    EnvironmentProcess,
    RemoteEnvironment,
)

FILE = '''
import asyncio, os, random, sys, time
from beside import SECRET

print("a line of the user's that is no reply")

def shout(text: str) -> str:
    """Shouts.

    Args:
        text: what.
    """
    return text.upper()

class Tools:
    """TRL's form: public methods are tools."""

    def __init__(self, factor: int = 2):
        self.factor = factor

    def reset(self, **row):
        self.row = row
        return f"{row['city']} {SECRET}"

    def times(self, number: int) -> int:
        """Multiplies.

        Args:
            number: what is multiplied.
        """
        return number * self.factor

    async def later(self, what: str) -> dict:
        """Waits.

        Args:
            what: the message.
        """
        await asyncio.sleep(0.01)
        return {"what": what, "pid": os.getpid()}

    def sleep(self, seconds: float) -> str:
        """Sleeps.

        Args:
            seconds: how long.
        """
        time.sleep(seconds)
        return "slept"

    def stubborn(self) -> str:
        """Never comes back, whatever is raised in it."""
        while True:
            try:
                time.sleep(100)
            except BaseException:
                pass

    def leave(self) -> str:
        """Ends its process."""
        os._exit(3)

    def quit(self) -> str:
        """Exits."""
        sys.exit("bye")

    def fail(self) -> str:
        """Raises."""
        raise KeyError("nothing there")

    def get_reward(self):
        return self.factor / 4

class Steps:
    """Gymnasium's form."""

    def reset(self, seed, city):
        self.seen = []
        return [{"role": "user", "content": f"{city} {random.random()} {seed}"}]

    def step(self, message):
        self.seen.append(message["content"])
        if message["content"] == "five":
            return "obs", 1, True, False, {"n": 2, "text": "x"}
        if message["content"] == "nan":
            return "obs", float("nan"), False
        if message["content"] == "nothing":
            return None
        return {"role": "user", "content": "again"}, 0.5, False, {"seen": len(self.seen)}

class NoReset:
    def step(self, message): ...

class NoTools:
    def reset(self): ...

class Undocumented:
    def reset(self): ...
    def tool(self, x): ...

class Raises:
    def __init__(self): raise ValueError("no key")
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("env")
    (folder / "beside.py").write_text("SECRET = 'hill'\n")
    (folder / "env.py").write_text(FILE)
    return folder / "env.py"


@pytest.fixture(scope="module")
def tools(file: Path) -> Iterator[EnvironmentProcess]:
    made = EnvironmentProcess(f"{file}:Tools", (f"{file}:shout",), {"factor": 3}, seconds=1.0)
    yield made
    made.close()


def asked(environment: RemoteEnvironment, what: str, *given: Any) -> Any:
    environment.ask(what, *given)
    return environment.answer()


def called(environment: RemoteEnvironment, name: str, **arguments: Any) -> dict[str, Any]:
    return asked(environment, "call", [{"name": name, "arguments": arguments}])[0]


def test_methods_are_tools_as_in_trl(tools: EnvironmentProcess):
    assert not tools.steps
    assert tools.rewards
    names = [tool["function"]["name"] for tool in tools.tools]
    assert names == ["shout", "fail", "later", "leave", "quit", "sleep", "stubborn", "times"]
    assert tools.tools[-1]["function"]["parameters"]["properties"]["number"]["type"] == "integer"
    one, other = tools.open(1), tools.open(1)
    assert asked(one, "reset", {"city": "Cork"}) == "Cork hill"
    assert asked(other, "reset", {"city": "Kent"}) == "Kent hill"
    assert called(one, "times", number=4) == {"content": "12", "ok": True}
    assert called(one, "shout", text="a")["content"] == "A"
    assert called(one, "later", what="é")["content"].startswith('{"what": "é", "pid": ')
    both = [{"name": "times", "arguments": {"number": 1}}] * 2
    assert [r["content"] for r in asked(one, "call", both)] == ["3", "3"]
    assert asked(one, "get_reward") == 0.75
    for name, arguments, says in (
        ("fail", {}, "KeyError"),
        ("nothing", {}, "times"),
        ("times", {}, "number"),
        ("reset", {}, "there is no function reset"),
        ("_done", {}, "there is no function"),
    ):
        result = called(other, name, **arguments)
        assert not result["ok"]
        assert result["content"].startswith("error: ")
        assert says in result["content"]
    one.let_go()
    other.let_go()


def test_a_tool_that_takes_too_long_is_told_so_and_one_that_does_not_end_is_ended(
    tools: EnvironmentProcess,
):
    stuck, slow, fine = (tools.open(0) for _ in range(3))
    for one in (stuck, slow, fine):
        assert asked(one, "reset", {"city": "Cork"})
    begun = time.monotonic()
    stuck.ask("call", [{"name": "stubborn", "arguments": {}}])
    slow.ask("call", [{"name": "sleep", "arguments": {"seconds": 100}}])
    assert called(fine, "times", number=2)["content"] == "6"
    assert time.monotonic() - begun < 1
    [result] = slow.answer()
    assert "longer than 1 s" in result["content"]
    assert asked(slow, "get_reward") == 0.75, "the environment goes on"
    with pytest.raises(EnvironmentFailedError, match="longer than 1 s"):
        stuck.answer()
    assert time.monotonic() - begun < 5
    for name, says in (("leave", "ended by itself"), ("quit", "bye")):
        with pytest.raises(EnvironmentFailedError, match=says):
            called(fine if name == "leave" else slow, name)
    again = tools.open(0)
    assert asked(again, "reset", {"city": "Cork"}) == "Cork hill"


def test_steps_are_gymnasiums_or_three_values_and_seeds_are_shared(file: Path):
    made = EnvironmentProcess(f"{file}:Steps", seconds=5)
    assert made.steps
    assert not made.tools
    one, same, other = made.open(7), made.open(7), made.open(8)
    first, second, third = (asked(e, "reset", {"city": "Cork"}) for e in (one, same, other))
    assert first == second != third
    assert first[0]["content"].endswith(" 7")
    answer = asked(one, "step", {"role": "assistant", "content": "hi"})
    again = {"role": "user", "content": "again"}
    assert answer == {"messages": [again], "reward": 0.5, "done": False, "metrics": {"seen": 1}}
    answer = asked(one, "step", {"role": "assistant", "content": "five"})
    assert answer == {"messages": "obs", "reward": 1.0, "done": True, "metrics": {"n": 2.0}}
    for content, says in (("nan", "nan"), ("nothing", "return")):
        with pytest.raises(EnvironmentFailedError, match=says):
            asked(same, "step", {"role": "assistant", "content": content})
    made.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoReset", "reset"),
        ("NoTools", "tools"),
        ("Undocumented", "docstring"),
        ("Raises", "no key"),
        ("Missing", "has no Missing"),
        ("SECRET", "no class or function"),
    ],
)
def test_what_is_no_environment_is_refused(file: Path, name: str, says: str):
    with pytest.raises(InputError, match=says):
        EnvironmentProcess(f"{file}:{name}")


def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path):
    (tmp_path / "bad.py").write_text("import nowhere_to_be_found\n")
    for spec, says in (
        (f"{tmp_path}/bad.py:X", "nowhere_to_be_found"),
        (f"{tmp_path}/none.py:X", "no file"),
        ("nowhere_to_be_found:X", "nowhere_to_be_found"),
        ("X", "FILE.py:NAME"),
    ):
        with pytest.raises(InputError, match=says):
            EnvironmentProcess(spec)


def test_closing_ends_what_hangs(file: Path):
    made = EnvironmentProcess(f"{file}:Tools", seconds=60)
    one = made.open(0)
    asked(one, "reset", {"city": "Cork"})
    pid = int(called(one, "later", what="")["content"].rpartition(" ")[2].rstrip("}"))
    one.ask("call", [{"name": "stubborn", "arguments": {}}])
    made.close()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the conversation's process is still there")
