"""A run starts from the adapter of another: stages, their record, and what is refused."""

import json
import math
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from command import run_lorakit
from lorakit.adapters.combine import combine
from lorakit.adapters.export.export_formats import FORMATS
from lorakit.adapters.inspect import inspect
from lorakit.adapters.joined import joined
from lorakit.adapters.lineage import digest
from lorakit.adapters.open import open_adapter
from lorakit.adapters.resize import resize
from lorakit.engine.open_engine import open_engine, open_with
from lorakit.errors import InputError
from lorakit.report.run_page import write_report
from lorakit.training.recipe import load_recipe
from lorakit.training.reproduce import reproduce, reproduce_chain
from small_runs import recipe, save_sums, weights

PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know" + "." * n}
    for n in range(12)
]


@pytest.fixture(scope="module")
def first(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished supervised run in float64."""
    folder = tmp_path_factory.mktemp("stages")
    values = recipe(tiny_model, save_sums(folder / "sums.jsonl"), folder / "sft", max_steps=3)
    lorakit.train(values | {"dtype": "float64"}, quiet=True)
    return folder / "sft"


def second(first: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of preferences in float64 that starts from `first`."""
    rows = output.parent / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    values = {
        "adapter": str(first),
        "dtype": "float64",
        "objective": {"type": "dpo", "beta": 0.5},
        "data": {"train": str(rows), "eval": 0.25},
        "training": {
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 3,
        },
        "samples": 0,
        "output_dir": str(output),
    }
    return values | changes


@pytest.fixture(scope="module")
def chained(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dpo`, which continues `first`, and `top`, a new one on the frozen `dpo`."""
    folder = tmp_path_factory.mktemp("chained")
    lorakit.train(second(first, folder / "dpo"), quiet=True)
    top = {"adapter": {"path": str(folder / "dpo"), "mode": "freeze"}, "lora": {"r": 2}}
    lorakit.train(second(first, folder / "top", objective="simpo", **top), quiet=True)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits
    return found


def test_a_preference_stage_continues_the_adapter_and_compares_with_it(first: Path, chained: Path):
    record = json.loads((chained / "dpo" / "lorakit.json").read_text())
    assert record["parent"]["path"] == str(first)
    assert record["parent"]["mode"] == "continue"
    assert record["parent"]["sha256"] == digest(first)
    assert record["stands_on"] == []
    assert record["start_eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert record["start_eval_scores"]["margin"] == 0
    assert abs(record["base_eval_loss"] - math.log(2)) > 1e-6
    assert record["eval_loss"] < math.log(2)
    assert not (chained / "dpo" / "reference").exists()
    assert weights(first).keys() == weights(chained / "dpo").keys()
    assert record["recipe"]["lora"]["r"] == 4


def test_the_first_loss_of_a_stage_is_that_of_no_difference(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "dpo", objective={"type": "dpo"})
    values["training"] |= {"max_steps": 1}
    lorakit.train(values, quiet=True)
    logged = [json.loads(x) for x in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)  # Trainer sums in float32


def test_a_killed_stage_resumes_to_the_same_bytes(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "dpo", lora={"lora_dropout": 0.1})
    lorakit.train(values, quiet=True)
    folder = tmp_path / "dpo"
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    for file in (folder / "checkpoint-4").iterdir():
        file.unlink()  # a whole one is left at step 2
    lorakit.train(values, resume=True, quiet=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_three_stages_merged_are_the_base_and_all_of_them(chained: Path, tmp_path: Path):
    record = json.loads((chained / "top" / "lorakit.json").read_text())
    assert [one["path"] for one in record["stands_on"]] == [str(chained / "dpo")]
    assert record["parent"]["parent"]["mode"] == "continue"
    opened = open_adapter(chained / "top", dtype="float64")
    assert opened.model.active_adapters == ["default", "frozen0"]
    expected = logits(opened.model)
    below = logits(open_adapter(chained / "dpo", dtype="float64").model)
    alone = logits(open_adapter(chained / "top", dtype="float64", alone=True).model)
    assert (expected - below).abs().max() > 1e-6
    assert (expected - alone).abs().max() > 1e-6
    for in_memory in (False, True):
        output = tmp_path / f"merged-{in_memory}"
        report = lorakit.merge(chained / "top", output, dtype="float64", in_memory=in_memory)
        assert report.streamed != in_memory
        found = logits(lorakit.load_model(str(output), "float64")[0])
        assert (found - expected).abs().max() < 1e-9
    joined = [chained / "top", chained / "dpo"]
    combine(joined, tmp_path / "one", weights=[1, 1], method="cat")
    found = logits(open_adapter(tmp_path / "one", dtype="float64").model)
    assert (found - expected).abs().max() < 1e-9
    FORMATS["vllm"].write(chained / "top", tmp_path / "vllm")
    found = logits(open_adapter(tmp_path / "vllm", dtype="float64").model)
    assert (found - expected).abs().max() < 1e-6  # written in float32


def test_every_verb_opens_both_or_names_the_command_that_joins_them(
    chained: Path, first: Path, tmp_path: Path
):
    top, pairs = chained / "top", chained / "pairs.jsonl"
    done = run_lorakit(tmp_path, "eval", top, "--data", pairs, "--metrics", "loss")
    assert done.returncode == 0, done.stderr
    with closing(open_with(None, "top", top, dtype="float32")) as engine:
        assert [info.rank for info in engine.pool.infos()] == [6]
    shown = run_lorakit(tmp_path, "diff", top, chained / "dpo")
    assert "added to the frozen" in shown.stderr
    command = "lorakit combine .*top .*dpo --weights 1,1 --method cat"
    with pytest.raises(InputError, match=command):
        resize(top, tmp_path / "resized", rank=1)
    with pytest.raises(InputError, match=command):
        combine([top, first], tmp_path / "combined", weights=[1, 1])
    with joined(top) as one:
        assert digest(one) != digest(top)
        rank = json.loads((one / "adapter_config.json").read_text())["r"]
    assert rank == 6
    with pytest.raises(InputError, match=re.escape(f"{top} cannot")), joined(top) as one:
        raise InputError(f"{one} cannot be exported")
    open_engine(None, {"top": top}, dtype="float32", merged=True).close()


def test_a_checkpoint_of_a_stage_is_opened_with_what_it_is_added_to(chained: Path):
    top = open_adapter(chained / "top" / "checkpoint-4", dtype="float64")
    assert top.model.active_adapters == ["default", "frozen0"]
    finished = open_adapter(chained / "top", dtype="float64")
    assert torch.equal(logits(top.model), logits(finished.model))
    assert inspect(chained / "top" / "checkpoint-4").stands_on == (str(chained / "dpo"),)
    for folder in (chained / "top", chained / "top" / "checkpoint-4"):
        assert str(chained / "dpo") in (folder / "README.md").read_text()


def test_a_reward_model_is_trained_on_top_of_an_adapter_that_writes(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "rm", objective="reward")
    with pytest.raises(InputError, match=r"CAUSAL_LM: train a new adapter on top .*mode=freeze"):
        lorakit.train(values, quiet=True)
    values |= {"adapter": {"path": str(first), "mode": "freeze"}, "lora": {"r": 2}}
    lorakit.train(values, quiet=True)
    opened = open_adapter(tmp_path / "rm", dtype="float64").model
    assert opened.active_adapters == ["default", "frozen0"]
    tokens = [5, 6, 7, 8, 9]
    with torch.no_grad():
        expected = opened(input_ids=torch.tensor([tokens])).logits.item()
        alone = open_adapter(tmp_path / "rm", dtype="float64", alone=True).model
        assert abs(alone(input_ids=torch.tensor([tokens])).logits.item() - expected) > 1e-6
    with closing(
        open_engine(None, {"rm": tmp_path / "rm", "sft": first}, dtype="float32")
    ) as engine:
        [piece] = engine.submit(tokens, "rm")
        assert piece.scores == pytest.approx((expected,), abs=1e-4)
    lorakit.merge(tmp_path / "rm", tmp_path / "merged", dtype="float64")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert merged(input_ids=torch.tensor([tokens])).logits.item() == pytest.approx(expected)


def test_a_stage_on_a_frozen_stage_stands_on_both(chained: Path, tmp_path: Path):
    values = second(chained / "top", tmp_path / "next")
    values["training"] |= {"max_steps": 1}
    found = lorakit.train(values, quiet=True).manifest
    assert [one.path for one in found.stands_on] == [str(chained / "dpo")]
    assert found.start_eval_loss == pytest.approx(math.log(2), abs=1e-12)
    values = second(chained / "top", tmp_path / "above")
    values["adapter"] = {"path": str(chained / "top"), "mode": "freeze"}
    values["training"] |= {"max_steps": 1}
    found = lorakit.train(values, quiet=True).manifest
    assert [one.path for one in found.stands_on] == [str(chained / n) for n in ("top", "dpo")]
    assert len(open_adapter(tmp_path / "above").model.active_adapters) == 3


def copied(chained: Path, first: Path, folder: Path) -> Path:
    """The chain at another place, whose recorded paths are those of copies there."""
    for source in (first, chained / "dpo", chained / "top"):
        shutil.copytree(source, folder / source.name)
    for name in ("dpo", "top"):
        path = folder / name / "lorakit.json"
        text = (
            path.read_text()
            .replace(str(chained), str(folder))
            .replace(str(first.parent), str(folder))
        )
        path.write_text(text)
    return folder


def test_a_parent_that_moved_along_is_found_and_a_changed_one_is_refused(
    first: Path, chained: Path, tmp_path: Path
):
    folder = copied(chained, first, tmp_path / "here")
    shutil.move(folder, tmp_path / "moved")
    top, dpo = tmp_path / "moved" / "top", tmp_path / "moved" / "dpo"
    assert len(open_adapter(top).model.active_adapters) == 2
    tensors = load_file(dpo / "adapter_model.safetensors")
    save_file(
        {key: tensor + 1 for key, tensor in tensors.items()}, dpo / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match=r"trained on top of .*dpo, which is another one now"):
        open_adapter(top)
    assert [parent.state for parent in inspect(top).parents] == ["changed", "unchanged"]
    shutil.rmtree(dpo)
    done = run_lorakit(tmp_path, "merge", top, "-o", tmp_path / "merged")
    assert done.returncode == 2
    assert "is missing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_start_that_has_changed_since_is_not_resumed_from(first: Path, tmp_path: Path):
    start = Path(shutil.copytree(first, tmp_path / "sft"))
    values = second(start, tmp_path / "dpo")
    lorakit.train(values, quiet=True)
    tensors = load_file(start / "adapter_model.safetensors")
    save_file(
        {key: tensor + 1 for key, tensor in tensors.items()}, start / "adapter_model.safetensors"
    )
    (tmp_path / "dpo" / "lorakit.json").unlink()
    with pytest.raises(InputError, match="parent was"):
        lorakit.train(values, resume=True, quiet=True)
    with pytest.raises(InputError, match="has started from it"):
        lorakit.train(values, resume=True, accept_changes=True, quiet=True)


def test_the_chain_is_shown_and_made_again(chained: Path, first: Path, tmp_path: Path):
    found = inspect(chained / "top").parents
    assert [(one.path, one.mode, one.state) for one in found] == [
        (str(chained / "dpo"), "freeze", "unchanged"),
        (str(first), "continue", "unchanged"),
    ]
    shown = run_lorakit(tmp_path, "inspect", chained / "top").stdout
    assert "on top of" in shown
    page = write_report(chained / "top", tmp_path / "report.html").path.read_text()
    assert digest(first)[:12] in page
    result = reproduce(chained / "top", tmp_path / "again", quiet=True)
    assert result.identical
    stages = reproduce_chain(chained / "dpo", tmp_path / "chain", quiet=True)
    assert [folder.name for folder, _ in stages] == ["chain-stage1", "chain"]
    assert all(one.identical for _, one in stages)
    record = json.loads((tmp_path / "chain" / "lorakit.json").read_text())
    assert record["parent"]["path"] == str(tmp_path / "chain-stage1")


def test_a_chain_with_a_missing_link_names_it(chained: Path, first: Path, tmp_path: Path):
    folder = copied(chained, first, tmp_path / "here")
    shutil.rmtree(folder / "sft")
    with pytest.raises(InputError, match=r"started from .*sft, which is missing"):
        reproduce(folder / "dpo", tmp_path / "again", quiet=True)
    with pytest.raises(InputError, match=r"started from .*sft, which is missing"):
        reproduce_chain(folder / "top", tmp_path / "again", quiet=True)
    assert not list(tmp_path.glob("again*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": {"r": 8}}, "lora.r is 8, and the adapter that is continued has 4"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules"),
        ({"lora": {"rr": 8}}, "lora.rr is not a recipe key"),
        ({"adapter": "nowhere"}, "adapter: nowhere is not a folder"),
        ({"adapter": "lora"}, "always trained"),
        ({"adapter": {"path": "x", "mode": "stack"}}, "adapter.mode"),
        ({"adapter": {"folder": "x"}}, "adapter.folder"),
        ({"tokens": ["<|call|>"]}, "cannot be added to an adapter that is continued"),
    ],
)
def test_what_contradicts_the_start_is_named(
    first: Path, tmp_path: Path, changes: dict[str, Any], named: str
):
    values = second(first, tmp_path / "dpo", **changes)
    with pytest.raises(InputError) as error:
        lorakit.train(values, quiet=True)
    assert named in str(error.value)
    assert not (tmp_path / "dpo").exists()


def test_a_recipe_says_again_what_the_start_was_trained_by(first: Path, tmp_path: Path):
    same = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
    made = load_recipe(second(first, tmp_path / "dpo", **same))
    assert made.to_dict() == load_recipe(second(first, tmp_path / "dpo")).to_dict()
    assert load_recipe(made.to_dict()).to_dict() == made.to_dict()


def test_another_base_is_refused_by_its_fingerprint(first: Path, tiny_model: Path, tmp_path: Path):
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    shutil.copytree(tiny_model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    values = second(first, tmp_path / "dpo", model=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"was trained on other weights than those of .*other"):
        lorakit.train(values, quiet=True)


def test_an_adapter_of_pefts_is_continued(tiny_model: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    theirs.save_pretrained(tmp_path / "theirs")
    found = lorakit.train(second(tmp_path / "theirs", tmp_path / "dpo"), quiet=True).manifest
    assert found.base_model == str(tiny_model)
    assert found.start_eval_loss == pytest.approx(math.log(2), abs=1e-12)
    changed = weights(tmp_path / "dpo")
    before = weights(tmp_path / "theirs")
    assert changed.keys() == before.keys()
    largest = max((changed[key] - before[key]).abs().max() for key in before)
    assert 0 < largest < 0.2
    again = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.PeftModel.from_pretrained(again, tmp_path / "dpo")


def test_a_sweep_starts_each_configuration_from_the_adapter(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "sweep")
    values["training"] |= {"max_steps": 2}
    values["data"] = {"eval": 0.5}
    pairs = [{**PAIRS[n % 12], "prompt": f"{n}?"} for n in range(40)]
    over = {"objective.beta": [0.1, 0.5]}
    [one, two] = lorakit.sweep(values, over=over, data=pairs, quiet=True)
    assert one["rungs"][-1]["selection"] < math.log(2)
    assert two["rungs"][-1]["selection"] < math.log(2)
    record = json.loads((Path(values["output_dir"]) / "beta0.1" / "lorakit.json").read_text())
    assert record["parent"]["sha256"] == digest(first)


def test_a_new_adapter_learns_on_a_frozen_one_what_it_learns_on_the_merged_model(
    first: Path, tmp_path: Path
):
    lorakit.merge(first, tmp_path / "merged", dtype="float64")
    on_frozen = second(first, tmp_path / "frozen", adapter={"path": str(first), "mode": "freeze"})
    on_merged = second(first, tmp_path / "plain", model=str(tmp_path / "merged"))
    del on_merged["adapter"]
    found = []
    for values in (on_frozen, on_merged):
        values |= {"lora": {"r": 2, "lora_alpha": 4}}
        values["training"] |= {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        found.append(lorakit.train(values, quiet=True).manifest)
    one, other = found
    assert one.start_eval_loss == pytest.approx(other.base_eval_loss, abs=1e-12)
    assert one.eval_loss == pytest.approx(other.eval_loss, abs=1e-9)
    own, theirs = weights(tmp_path / "frozen"), weights(tmp_path / "plain")
    assert own.keys() == theirs.keys()
    assert max((own[key] - theirs[key]).abs().max() for key in own) < 1e-9
    assert any("lora_B" in key and own[key].any() for key in own)


def test_kto_compares_with_the_start_too(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "kto", objective={"type": "kto", "beta": 0.5})
    values["training"] |= {"max_steps": 2}
    found = lorakit.train(values, quiet=True).manifest
    assert found.start_eval_scores is not None
    assert found.start_eval_scores["kl"] == pytest.approx(0, abs=1e-9)
    assert found.start_eval_loss == pytest.approx(0.5, abs=1e-9)
    assert found.eval_loss is not None
    assert found.eval_loss < 0.5


def test_a_classifier_is_continued_with_its_head_and_its_labels(tiny_model: Path, tmp_path: Path):
    rows = [{"text": f"{word} {n}", "label": word} for n in range(12) for word in ("yes", "no")]
    values = recipe(tiny_model, tmp_path, tmp_path / "one", max_steps=3)
    values |= {"objective": "classification", "dtype": "float64", "data": {"eval": 0.25}}
    one = lorakit.train(values, data=rows, quiet=True).manifest
    on = {"adapter": str(tmp_path / "one"), "output_dir": str(tmp_path / "two"), "dtype": "float64"}
    on |= {"training": {"max_steps": 1}, "data": {"eval": 0.25}}
    two = lorakit.train(on, data=rows, quiet=True).manifest
    assert two.start_eval_loss == pytest.approx(one.eval_loss, abs=1e-9)
    others = [{**row, "label": f"{row['label']}!"} for row in rows]
    with pytest.raises(InputError, match="tells apart no, yes"):
        lorakit.train(on | {"output_dir": str(tmp_path / "three")}, data=others, quiet=True)


@pytest.mark.exhaustive
def test_a_sweep_of_new_adapters_on_a_frozen_one(first: Path, tmp_path: Path):
    values = second(first, tmp_path / "sweep", adapter={"path": str(first), "mode": "freeze"})
    values["training"] |= {"max_steps": 2}
    values["data"] = {"eval": 0.5}
    pairs = [{**PAIRS[n % 12], "prompt": f"{n}?"} for n in range(40)]
    found = lorakit.sweep(values, over={"lora.r": [1, 2]}, data=pairs, quiet=True)
    assert all(one["rungs"][-1]["selection"] < math.log(2) for one in found)
    opened = open_adapter(tmp_path / "sweep" / "r1", dtype="float64")
    assert opened.model.active_adapters == ["default", "frozen0"]
