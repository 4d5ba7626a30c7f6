"""`report.html`: what is known of a run, drawn into one file that needs nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorakit.adapters.lineage import chain, whereabouts
from lorakit.data.conversations import IMAGE
from lorakit.data.thumbnails import THUMBNAIL, is_thumbnail
from lorakit.folder_name import folder_name
from lorakit.report import findings, numbers
from lorakit.report.charts import Chart, Line, histogram, line_chart, smoothed
from lorakit.report.heat_map import LEVELS, heat_maps
from lorakit.report.page_templates import require_place, write_page
from lorakit.report.preferences import fall_of_both, preference_charts, preference_figures
from lorakit.report.read import RecordedSample, RunRecord, read_run
from lorakit.report.rewards import RewardPage, reward_page, shown_rewards

REPORT_NAME = "report.html"
_SMOOTH_FROM = 50  # logged steps from which a curve gets a smoothed one
_LONGEST_TEXT = 3000  # characters of a sample's text that are shown
_MOST_SAMPLES = 20
_MOST_PICTURES = 8  # of a message


@dataclass(frozen=True)
class Report:
    """A written page, and what could not be put into it."""

    path: Path
    notices: list[str]


def write_report(adapter: str | Path, output: str | Path | None = None) -> Report:
    """Writes the report of the adapter in a folder.

    Args:
        adapter: the adapter's folder; what else of the run lies there is used.
        output: the file to write; default is `report.html` in the adapter's folder. An earlier
            report there is replaced.

    Raises:
        InputError: the folder holds no usable adapter, or `output` is something else's place.
        LorakitError: the file cannot be written.
    """
    path = Path(output) if output is not None else Path(adapter) / REPORT_NAME
    run = read_run(adapter)
    require_place(path, "report", REPORT_NAME, "give another name with -o")
    write_page(path, "report", _content(run))
    return Report(path, run.notices)


def _content(run: RunRecord) -> dict[str, Any]:
    """All that the template names."""
    manifest = run.manifest
    rewards = reward_page(run)
    movement = run.movement.relative_updates() if run.movement else {}
    norms = {s.path: s.norm for s in run.spectra}
    ranks = {s.path: s.effective_rank for s in run.spectra}
    change, change_name = (movement, "‖ΔW‖ / ‖W‖, in %") if movement else (norms, "‖ΔW‖")
    change_text = _hundredfold if movement else _two_figures
    change_top = findings.nearly_largest(change.values())
    rank_top = max((s.r for s in run.spectra), default=0)
    settings = {k: v for k, v in json.loads(run.config.to_json()).items() if v}
    recipe = manifest.recipe if manifest else settings
    learned_from = manifest.teacher if manifest else None
    teacher = (learned_from, whereabouts(learned_from, run.folder)[1]) if learned_from else None
    return {
        "name": folder_name(run.folder),
        "base_model": manifest.base_model if manifest else run.config.base_model_name_or_path,
        "run": run,
        "manifest": manifest,
        "stages": [*chain(run.folder)],
        "teacher": teacher,
        "verdict": _verdict(run, rewards),
        "key_figures": _key_figures(run, rewards),
        "curves": _curves(run, rewards),
        "rewards": rewards,
        "pairs": [_pair(pair) for pair in rewards.pairs] if rewards else [],
        "data": _data(run),
        "change_is_relative": bool(movement),
        "change_top": f"{(_per_cent if movement else _two_figures)(change_top)} or more",
        "change_maps": heat_maps(change, change_top, change_text, change_name),
        "change_name": change_name,
        "rank_maps": heat_maps(ranks, rank_top, "{:.1f}".format, "effective rank"),
        "rank_top": rank_top,
        "rank_advice": findings.rank_advice(run.spectra, manifest.steps if manifest else None),
        "findings": findings,
        "levels": LEVELS,
        "movement": {path: _per_cent(value) for path, value in movement.items()},
        "samples": [_sample(sample) for sample in run.samples[:_MOST_SAMPLES]],
        "hidden_samples": max(0, len(run.samples) - _MOST_SAMPLES),
        "configuration": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=88),
    }


def _verdict(run: RunRecord, rewards: RewardPage | None) -> str:
    if rewards and rewards.verdict:
        return rewards.verdict
    return f"{findings.verdict(run)} {fall_of_both(run)}".strip()


def _key_figures(run: RunRecord, rewards: RewardPage | None) -> list[tuple[str, str, str]]:
    found = findings.key_figures(run)
    if rewards and any(name == "Held-out reward" for name, *_ in rewards.key_figures):
        found = [figure for figure in found if figure[0] != "Held-out loss"]
    return [*(rewards.key_figures if rewards else ()), *found, *preference_figures(run)]


def _curves(run: RunRecord, rewards: RewardPage | None) -> list[Chart]:
    """The charts over steps, those without data left out; with rewards theirs come first."""
    loss, held_out = run.series("loss"), run.series("eval_loss")
    base = findings.first_loss(run.manifest) if run.manifest else None
    if base is not None and math.isfinite(base) and held_out:
        held_out = [(0.0, base), *held_out]
    moved = run.movement.together() if run.movement else []
    charts = [
        *(rewards.charts if rewards else ()),
        line_chart(
            "Loss", [*_with_mean("training", loss), Line("held out", "dots second", held_out)]
        ),
        *preference_charts(run),
        line_chart("Gradient norm", _with_mean("", run.series("grad_norm"))),
    ]
    for title, name, points, text in (
        ("Learning rate", "learning rate", run.series("learning_rate"), numbers.power),
        ("Tokens per second", "tokens/s", run.series("tokens_per_second"), numbers.count),
        ("Change of the weights, ‖ΔW‖ / ‖W‖", "all modules", moved, _per_cent),
    ):
        line = Line(name, "line first", points)
        charts.append(line_chart(title, [line], from_zero=True, text=text))
    return [chart for chart in charts if chart]


def _with_mean(name: str, points: list[tuple[float, float]]) -> list[Line]:
    """A curve, and where it has many points a smoothed one before its own faint self."""
    if len(points) < _SMOOTH_FROM:
        return [Line(name or "as logged", "line first", points)]
    window = 2 * (len(points) // 50) + 1
    mean = f"{name}{', ' if name else ''}mean of {window}"
    return [
        Line(name or "as logged", "line faint", points),
        Line(mean, "line first", smoothed(points, window)),
    ]


def _data(run: RunRecord) -> list[dict[str, Any]]:
    """Statistics and histogram of each part of the data."""
    recipe = run.manifest.recipe if run.manifest else {}
    data = recipe.get("data")
    cut = data.get("max_length") if isinstance(data, dict) else None
    cut = float(cut) if isinstance(cut, int | float) else None
    names = {"train": "Rows to learn from", "eval": "Rows held out"}
    return [
        {
            "name": names.get(key, key),
            "split": split,
            "chart": histogram("Length in tokens", split.histogram, cut),
        }
        for key, split in run.data_statistics.items()
    ]


def _sample(sample: RecordedSample) -> dict[str, Any]:
    """One sample's texts, the long ones cut and the cut counted."""
    return {
        "prompt": [(turn.role, *_turn(turn.content)) for turn in sample.prompt],
        "answers": [
            ("Before", "the base", _shown(sample.base), sample.base.strip()),
            ("After", "with the adapter", _shown(sample.tuned), sample.tuned.strip()),
            ("Reference", "the row's own answer", _shown(sample.reference), ""),
        ],
        "reference": sample.reference.strip(),
    }


def _pair(pair: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The prompt of an early and a late completion, and both with their rewards."""
    prompts = [*dict.fromkeys(one["prompt"] for one in pair)]
    shown = [
        {
            **one,
            "text": _shown(one["completion"]),
            "worth": f"reward {shown_rewards({'': one['reward']}).strip()}"
            + (f": {shown_rewards(one['rewards'])}" if len(one["rewards"]) > 1 else ""),
        }
        for one in pair
    ]
    return _shown("\n\n".join(prompts)), shown


def _turn(content: Any) -> tuple[str, list[dict[str, str]]]:
    """A message's text, and the thumbnails of its pictures with their names."""
    kinds = {"text", IMAGE}
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and part.get("type") in kinds for part in content
    ):
        return _shown(content), []
    texts: list[str] = []
    pictures: list[dict[str, str]] = []
    for part in content:
        if part["type"] == "text":
            texts.append(str(part.get("text", "")))
            continue
        name = Path(str(part.get(IMAGE))[:200]).name
        if is_thumbnail(url := part.get(THUMBNAIL)) and len(pictures) < _MOST_PICTURES:
            pictures.append({"name": name, "url": url})
        else:
            texts.append(f"[picture {name}]")
    return _shown(" ".join(texts)), pictures


def _shown(text: Any) -> str:
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=2)
    rest = len(text) - _LONGEST_TEXT
    return text if rest <= 0 else f"{text[:_LONGEST_TEXT]} … ({rest:,} more characters)"


def _per_cent(value: float) -> str:
    return f"{_hundredfold(value)} %"


def _hundredfold(value: float) -> str:
    return _two_figures(100 * value)


def _two_figures(value: float) -> str:
    return numbers.figures(value, 2)
