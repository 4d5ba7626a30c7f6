"""Tasks of lm-evaluation-harness: what its own Hugging Face backend gives, for many adapters."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from command import run_lorakit
from harness_tasks import write_task, write_tasks
from lorakit.cli.eval_tasks import evaluate_on_tasks
from lorakit.engine.open_engine import open_engine
from lorakit.evaluation.harness import (
    HarnessEvaluation,
    HarnessSettings,
    Score,
    change,
    evaluate_tasks,
)
from lorakit.evaluation.harness_index import HarnessIndex
from random_adapters import make_adapter


@pytest.fixture(scope="module")
def adapters(attentive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_adapter(attentive_folder, folder / "one", 1),
        "two": make_adapter(attentive_folder, folder / "two", 2, r=2, target_modules=["q_proj"]),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def evaluated(
    base: Path, adapters: dict[str, Path], settings: HarnessSettings
) -> HarnessEvaluation:
    engine = open_engine(str(base), adapters, dtype="float32", max_rows=None)
    try:
        return evaluate_tasks(engine, adapters, settings)
    finally:
        engine.close()


def by_peer(base: Path, adapter: Path | None, settings: HarnessSettings) -> dict[str, Any]:
    """The same by the harness's own backend, whose adapters PEFT loads."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    more = {} if adapter is None else {"peft": str(adapter)}
    lm = HFLM(pretrained=str(base), dtype="float32", device="cpu", batch_size=3, **more)
    [folder] = settings.tasks
    found: Any = simple_evaluate(
        lm,
        tasks=["own_choice", "own_text", "own_write"],
        num_fewshot=settings.num_fewshot,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        apply_chat_template=settings.apply_chat_template,
    )
    return found


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_results_are_those_of_the_harness_own_backend(
    attentive_folder: Path, adapters: dict[str, Path], tasks: Path, chat: bool
):
    settings = HarnessSettings([str(tasks)], num_fewshot=1, apply_chat_template=chat)
    found = evaluated(attentive_folder, adapters, settings)
    assert [*found.models] == ["base", "one", "two"]
    for name, adapter in {"base": None, **adapters}.items():
        wanted = by_peer(attentive_folder, adapter, settings)
        for task, samples in wanted["samples"].items():
            own = found.samples[name][task]
            assert [one["arguments"] for one in own] == [one["arguments"] for one in samples]
            flat = [_flat(one["resps"]) for one in own]
            expected = [_flat(one["resps"]) for one in samples]
            for one, other in zip(flat, expected, strict=True):
                assert [x for x in one if isinstance(x, str)] == [
                    x for x in other if isinstance(x, str)
                ]
                numbers = [x for x in other if not isinstance(x, str)]
                assert [x for x in one if not isinstance(x, str)] == pytest.approx(
                    numbers, rel=1e-4, abs=1e-4
                )
        for one in found.metrics:
            metric = one.metric if "," in one.metric else f"{one.metric},none"
            value = wanted["results"][one.task][metric]
            assert one.scores[name].value == pytest.approx(value, rel=1e-4)
            stderr = wanted["results"][one.task][metric.replace(",", "_stderr,")]
            assert one.scores[name].stderr == (
                None if stderr == "N/A" or math.isnan(stderr) else pytest.approx(stderr, rel=1e-3)
            )
    answers = [
        [one["resps"] for one in found.samples[name]["own_write"]] for name in ("base", "one")
    ]
    assert answers[0] != answers[1]  # else nothing was tested


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _flat(one)]
    return [float(value) if isinstance(value, bool) else value]


def test_the_command_compares_adapters_with_their_base_and_writes_json(
    attentive_folder: Path, adapters: dict[str, Path], tasks: Path, tmp_path: Path
):
    named = [f"{name}={path}" for name, path in adapters.items()]
    options = ["--base", attentive_folder, "--dtype", "float32", "--limit", "3"]
    file = tmp_path / "scores.json"
    chosen = f"{tasks / 'own_choice.yaml'},{tasks / 'own_write.yaml'}"
    done = run_lorakit(
        tmp_path, "eval", *named, *options, "--tasks", chosen, "--json", file, "--log-samples"
    )
    assert done.returncode == 0, done.stderr
    assert "own_choice" in done.stdout
    assert "%|" not in done.stdout + done.stderr  # no bars of the harness
    found = json.loads(file.read_text())
    assert [*found["models"]] == ["base", "one", "two"]
    assert {(one["task"], one["documents"]) for one in found["metrics"]} == {
        ("own_choice", 3), ("own_write", 3),
    }  # fmt: skip
    assert {*found["metrics"][0]["changes"]} == {"one", "two"}
    assert len(found["samples"]["two"]["own_write"]) == 3
    alone = run_lorakit(tmp_path, "eval", *options, "--tasks", str(tasks / "own_choice.yaml"))
    assert alone.returncode == 0, alone.stderr


def test_what_cannot_be_evaluated_is_one_line(
    attentive_folder: Path,
    adapters: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    far = tmp_path / "far"
    far.mkdir()
    (far / "x.jsonl").write_text("{}\n")
    missing = write_task(far, "missing", output_type="multiple_choice")
    long = write_task(
        tasks, "long_answers", output_type="generate_until", doc_to_text="{{question}}",
        doc_to_target="x", generation_kwargs={"max_gen_toks": 4000},
    )  # fmt: skip
    empty = write_task(
        tasks, "empty", output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="{{['' if answer == 1 else 'b', 'a']}}", doc_to_target=1, target_delimiter="",
    )  # fmt: skip
    broken = far / "broken.yaml"
    broken.write_text("task: [")
    given = ["eval", adapters["one"], "--base", attentive_folder]
    for arguments, words in (
        (["--tasks", "own_choice", "--include-path", tmp_path / "no"], "is not a folder"),
        (["--tasks", missing], "missing"),
        (["--tasks", broken], "broken"),
        (["--tasks", tmp_path / "none.yaml"], "none.yaml"),
        (["--tasks", long], "max_gen_toks"),
        (["--tasks", empty], "no token of its own"),
        (["--tasks", tasks, "--data", "x"], "--data"),
        (["--data", "x", "--num-fewshot", "1"], "--num-fewshot"),
        (["--tasks", tasks, "--log-samples"], "--json"),
    ):
        written = [] if "--log-samples" in arguments else ["--json", tmp_path / "x.json"]
        done = run_lorakit(tmp_path, *given, *arguments, *written)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "x.json").exists()
    long.unlink()
    empty.unlink()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run_lorakit(tmp_path, *given, "--tasks", tasks)
    assert done.returncode == 2
    assert "pip install 'lorakit[lm-eval]'" in done.stderr


def test_adapters_that_change_the_base_are_merged_and_asked_after_the_others(
    attentive_folder: Path, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    alone = make_adapter(attentive_folder, tmp_path / "alone", 7, bias="lora_only")
    settings = HarnessSettings([str(tasks)])
    options = {"base": str(attentive_folder), "dtype": "float32", "quantization": None}
    found = evaluate_on_tasks(
        {"alone": alone, "one": adapters["one"]}, settings, {**options, "weights": None}, 4
    )
    assert found.models["alone"] == str(alone)
    wanted = by_peer(attentive_folder, alone, settings)
    for one in found.metrics:
        assert {*one.scores} == {"base", "one", "alone"}
        key = f"{one.metric},none"
        if key in wanted["results"][one.task]:
            assert one.scores["alone"].value == pytest.approx(
                wanted["results"][one.task][key], abs=1e-4
            )


def test_names_groups_and_tags_are_found_without_parsing_all_files(tmp_path: Path) -> None:
    for name, text in {
        "a/plain": "task: plain_one\noutput_type: x\n",
        "a/base": "tag: shared\noutput_type: x\n",
        "a/with_base": 'include: base.yaml\ntask: "quoted.two"  # said\n',
        "b/listed": "tag:\n  - shared\n  - other\ntask: three\n",
        "b/inline": "'task': \"four\"\n\"tag\": ['other', more]\n",
        "b/group": "group: all_of_it\ntask:\n  - group: inner\n    task: [three]\n  - shared\n",
        "b/class": "task: five\ngroup: none\nclass: !function x.Y\n",
        "b/nothing": "doc_to_text: a\n",
        "b/broken": "task: [",
    }.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    index = HarnessIndex(tmp_path)
    full = TaskManager(include_path=tmp_path, include_defaults=False)
    assert {*index.files} == {*full.all_tasks}
    assert index.matching("*o*") == [name for name in full.all_tasks if "o" in name]
    for name in full.all_tags:
        found: dict[str, Any] = {}
        index.add([name], found)
        assert found[name].tags == full.task_index[name].tags
    found = {}
    index.add(["all_of_it"], found)
    assert {*found} >= {"all_of_it", "three", "shared", "quoted.two"}
    assert "plain_one" not in found


@pytest.mark.exhaustive  # the harness reads all of its own tasks
def test_the_harness_own_tasks_are_found_as_it_finds_them() -> None:
    index, full = HarnessIndex(), TaskManager()
    assert {*index.files} == {*full.all_tasks}


def test_an_unknown_task_is_told_with_the_nearest(
    attentive_folder: Path, adapters: dict[str, Path], tasks: Path, tmp_path: Path
):
    given = ["eval", adapters["one"], "--base", attentive_folder, "--include-path", tasks]
    done = run_lorakit(tmp_path, *given, "--tasks", "own_choise")
    assert done.returncode == 2
    assert "own_choise" in done.stderr
    assert "own_choice" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_adapter_that_changes_nothing_is_told(
    attentive_folder: Path, tasks: Path, tmp_path: Path
):
    import lorakit

    model, _ = lorakit.load_model(str(attentive_folder), "float32")
    zero = tmp_path / "zero"
    lorakit.get_peft_model(
        model, lorakit.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(zero)
    settings = HarnessSettings([str(tasks / "own_choice.yaml")], limit=2)
    found = evaluated(attentive_folder, {"zero": zero}, settings)
    assert any("zero answers every request exactly as the base" in one for one in found.notices)
    assert {one.changes["zero"].verdict for one in found.metrics} == {"unclear"}


def test_changes_are_paired_by_documents_and_told_from_chance():
    values = [0.0, 1.0] * 20
    raised = [1.0, 1.0] * 10 + values[20:]
    base, own = Score(0.5, 0.08), Score(0.75, 0.07)
    better = change(base, own, values, raised, True)
    assert better.verdict == "better"
    assert better.low is not None
    assert better.high is not None
    assert better.low > 0  # unpaired the interval would hold 0: 0.25 - 1.96 * 0.106 is 0.04
    assert better.high - better.low < 2 * 1.96 * math.hypot(0.08, 0.07)
    assert change(base, own, values, raised, False).verdict == "worse"
    assert change(base, base, values, values, True).verdict == "unclear"
    # A perplexity is no mean of its documents: standard errors are what there is.
    perplexity = change(Score(9.0, 0.1), Score(7.0, 0.1), [1.0, 2.0], [3.0, 4.0], False)
    assert perplexity.verdict == "better"
    assert change(Score(9.0, None), Score(7.0, None), [], [], False).verdict == "unclear"
