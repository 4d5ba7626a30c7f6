"""An adapter that was trained on top of a frozen one is served with it, beside others."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.lineage import digest, write_stage
from lorakit.adapters.manifest import FrozenRecord
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from random_adapters import make_adapter

GREEDY = Sampling(max_new_tokens=12, logprobs=0)
PROMPT = [40, 41, 42, 43, 44]


@pytest.fixture
def stack(base: Path, adapters: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """`top`, of rank 2 on two modules, on a frozen copy of `shop`, of rank 4 on all."""
    below = Path(shutil.copytree(adapters["shop"], tmp_path / "below"))
    top = make_adapter(base, tmp_path / "top", 9, r=2, target_modules=["q_proj", "down_proj"])
    write_stage(top, [FrozenRecord(path=str(below), sha256=digest(below))])
    return {"top": top, "below": below}


def answers(engine: Engine, names: list[str | None]) -> list[tuple[list[int], list[float]]]:
    tickets = [engine.submit(PROMPT, name, GREEDY) for name in names]
    chosen = [[one for piece in ticket for one in piece.logprobs] for ticket in tickets]
    return [([one.token for one in row], [one.logprob for one in row]) for row in chosen]


def test_a_stack_answers_beside_others_as_the_base_into_which_both_are_merged(
    start: Any, base: Path, adapters: dict[str, Path], stack: dict[str, Path]
):
    engine = start(adapters=adapters | stack)
    rows: list[str | None] = ["top", None, "below", "poet"]
    found = answers(engine, rows)
    assert [i.rank for i in engine.pool.infos() if i.name in stack] == [6, 4]
    options: dict[str, Any] = {"dtype": "float32", "merged": True}
    with closing(open_engine(str(base), {"top": stack["top"]}, **options)) as merged:
        [(tokens, logprobs)] = answers(merged, [None])
    assert found[0][0] == tokens
    assert found[0][1] == pytest.approx(logprobs, abs=1e-4)
    assert found[2] != found[0]
    assert answers(engine, ["below"])[0][0] == found[2][0]


def test_what_is_below_must_be_what_it_was_and_lie_below_the_same_root(
    start: Any, stack: dict[str, Path], tmp_path: Path
):
    engine = start(adapters={})
    engine.pool.register("top", Path("top"), root=tmp_path)
    shutil.copytree(stack["top"], tmp_path / "inside" / "top")
    with pytest.raises(InputError, match=r"on top of the adapter .*below, which is missing"):
        engine.pool.register("other", Path("top"), root=tmp_path / "inside")
    shutil.copytree(stack["below"], tmp_path / "inside" / "below")  # moved along
    engine.pool.register("other", Path("top"), root=tmp_path / "inside")
    shutil.copy(
        stack["top"] / "adapter_config.json", stack["below"]
    )  # another adapter by its digest
    with pytest.raises(InputError, match="is another one now"):
        engine.pool.register("top", stack["top"])
