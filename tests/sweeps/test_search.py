"""Which configurations are trained how far, whatever trains them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.sweeps.records import Progress, Rung, read_record
from lorakit.sweeps.search import Search
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.splits import REPORT, SELECTION
from lorakit.training.recipe import load_recipe


class Scripted:
    """A runner whose losses are known: `loss / share`, and who is no number from which share on."""

    def __init__(self, losses: dict[str, float], falls: dict[str, float]) -> None:
        self.losses, self.falls = losses, falls
        self.asked: list[tuple[float, list[str]]] = []

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        self.asked.append((to, [c.name for c in configurations]))
        found = {}
        for name in self.asked[-1][1]:
            fallen = "the loss is nan at step 1" if to >= self.falls.get(name, 2) else None
            rows = [(self.losses[name] / to, 1)] * 8
            losses = {} if fallen else {SELECTION: rows, REPORT: rows}
            found[name] = Progress(round(90 * to), 90, losses, fallen, [(1, 2.0)], 1.0)
        return found


class Rounds:
    """A sampler that draws what it is given, round by round."""

    def __init__(self, *rounds: list[int]) -> None:
        self.rounds = rounds
        self.known: list[Any] = []

    def draw(self, before: Sequence[Any], known: Sequence[Any]) -> list[dict[str, Any]]:
        self.known.append([outcome.changes["n"] for outcome in known])
        drawn = 0
        for own in self.rounds:
            if drawn == len(before):
                return [{"n": n} for n in own]
            drawn += len(own)
        return []


def search(folder: Path, sampler: Rounds, runner: Scripted, shares: list[float]) -> Search:
    recipe = load_recipe({"model": "m", "data": {"train": "r"}, "output_dir": str(folder)})

    def make(draws, taken):
        return [
            Configuration(f"c{d['n']}", d, recipe.filled_in({"output_dir": f"{folder}/c{d['n']}"}))
            for d in draws
        ]

    def cost(rung: Rung) -> float:
        return rung.means[SELECTION]

    return Search(sampler, make, runner, shares, 3, lambda line: None, cost, str)


def test_each_rung_is_climbed_by_a_third(tmp_path: Path):
    runner = Scripted({f"c{n}": float(n) for n in range(9)}, {})
    search(tmp_path, Rounds(list(range(9))[::-1]), runner, [1 / 9, 1 / 3, 1]).run()
    assert runner.asked == [
        (1 / 9, [f"c{n}" for n in range(9)][::-1]),
        (1 / 3, ["c2", "c1", "c0"]),
        (1, ["c0"]),
    ]


def test_a_later_round_goes_on_only_where_it_is_among_the_best_so_far(tmp_path: Path):
    runner = Scripted({f"c{n}": float(n) for n in range(9)}, {"c3": 0.3})
    sampler = Rounds([1, 4, 5], [6, 7, 3], [0, 8])
    records = search(tmp_path, sampler, runner, [1 / 3, 1]).run()
    assert [names for share, names in runner.asked if share == 1] == [["c1"], ["c0"]]
    assert [r.configuration.name for r in records if r.finished] == ["c1", "c0"]
    # The sampler learns of all but of what diverged.
    assert sampler.known[-1] == [1, 4, 5, 6, 7, 0, 8]


def test_where_the_best_diverge_late_the_next_best_takes_their_place(tmp_path: Path):
    runner = Scripted({f"c{n}": float(n) for n in range(3)}, {"c0": 1, "c1": 1})
    records = search(tmp_path, Rounds([0, 1, 2]), runner, [1 / 3, 1]).run()
    assert [names for share, names in runner.asked if share == 1] == [["c0"], ["c1"], ["c2"]]
    assert [r.finished for r in records] == [False, False, True]


def test_what_is_recorded_is_not_trained_again(tmp_path: Path):
    losses = {f"c{n}": float(n) for n in range(9)}
    first = Scripted(losses, {"c8": 0.1})
    wanted = search(tmp_path, Rounds(list(range(9))), first, [1 / 9, 1 / 3, 1]).run()
    again = Scripted(losses, {"c8": 0.1})
    found = search(tmp_path, Rounds(list(range(9))), again, [1 / 9, 1 / 3, 1]).run()
    assert again.asked == []
    assert [vars(r) | {"configuration": None} for r in found] == [
        vars(r) | {"configuration": None} for r in wanted
    ]


def test_a_damaged_record_is_named(tmp_path: Path):
    runner = Scripted({"c0": 1.0}, {})
    [record] = search(tmp_path, Rounds([0]), runner, [1]).run()
    record.path.write_text("{")
    with pytest.raises(ValueError, match=r"sweep-progress\.json is damaged: remove it"):
        read_record(record.configuration)
