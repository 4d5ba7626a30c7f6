"""Compiling changes the speed and not the step, and is chosen where it pays."""

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import lorakit
from lorakit.data.batches import LineCollator
from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError
from lorakit.models.lines import take_lines
from lorakit.models.loss import SupervisedLoss
from lorakit.training import compiling
from lorakit.training.compiling import choose, compile_blocks, run_flops
from lorakit.training.recipe import load_recipe
from lorakit.training.run_record import write_samples
from lorakit.training.setup import set_up
from matrix import few
from small_runs import recipe, save_sums


def adapted(folder: Path, targets: Any = "all-linear") -> Any:
    model, _ = lorakit.load_model(folder, "float64")
    torch.manual_seed(0)
    config = lorakit.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return lorakit.get_peft_model(model, config).train()


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [list(range(2, 2 + n)) for n in lengths]
    return LineCollator()([TokenizedRow(row, [-100, *row[1:]], "") for row in rows])


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    few([("eager", False), ("inductor", False), ("inductor", True)], ("eager", False)),
)
def test_a_compiled_step_is_the_same_and_other_lengths_compile_nothing_anew(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, backend: str, checkpointing: bool
):
    # The same graphs are taken for each, and eager leaves out the C++ compiler's minute.
    compiled = partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compiled)
    # Every adapted layer takes its time to be traced.
    model = adapted(tiny_model, ["v_proj", "up_proj"] if backend == "eager" else "all-linear")
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    assert take_lines(model) is None
    loss = SupervisedLoss(model)

    def step(*lengths: int) -> dict[str, torch.Tensor]:
        total, _ = loss(model, batch(*lengths))
        total.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"loss": total.detach(), **found}

    several = [(5, 9), (3, 4, 8, 2), (21,), (30, 1), (17, 2)]
    wanted = [step(*lengths) for lengths in several]
    compile_blocks(model)
    found = [step(*several[0]), step(*several[1])]
    torch._dynamo.reset_frame_count()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    found += [step(*lengths) for lengths in several[2:]]
    assert counters["stats"]["unique_graphs"] == 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            # The model's norms round to float32, in an order that the compiler may change.
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-6)


def test_a_long_run_is_compiled_and_a_short_one_is_not(tiny_model: Path):
    model, _ = lorakit.load_model(tiny_model, "float32")
    enough = compiling.PAYS_FROM["cpu", "float32"] / run_flops(model, 1)
    assert choose("auto", model, 0.9 * enough) == (False, "")
    assert choose("auto", model, 1.1 * enough)[0]
    assert not choose(False, model, 1.1 * enough)[0]
    assert choose(True, model, 1)[0]


def test_what_cannot_be_compiled_is_an_error_where_asked_for_and_else_a_notice(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _ = lorakit.load_model(tiny_model, "float32")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"no C\+\+ compiler"):
        choose(True, model, 1)
    compiled, notice = choose("auto", model, 1e15)
    assert not compiled
    assert "no C++ compiler" in notice
    single = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="BloomForCausalLM"):
        choose(True, single, 1)


def test_sample_answers_of_a_compiled_run_compile_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: Any) -> Any:
        raise AssertionError("a block is compiled")

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=refused))
    values = recipe(tiny_model, save_sums(tmp_path / "rows.jsonl"), tmp_path / "run")
    setup = set_up(load_recipe(values | {"compile": True, "samples": 2}))
    with setup.fast():
        assert write_samples(tmp_path, setup) == []
        assert len(json.loads((tmp_path / "samples.json").read_text())) == 2
        with pytest.raises(Exception, match="a block is compiled"):
            setup.model(**batch(5), use_cache=False)


@pytest.mark.exhaustive
def test_a_compiled_run_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{n}?", "completion": str(n) * (1 + n % 3)}) for n in range(24)]
    rows.write_text("\n".join(lines))
    values = {
        "model": str(tiny_model),
        "dtype": "float32",
        "compile": True,
        "data": {"train": str(rows), "eval": 0.25},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "training": {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4},
    }
    whole = lorakit.train(values, f"output_dir={tmp_path / 'whole'}")
    assert whole.manifest.compiled
    lorakit.train(values, f"output_dir={tmp_path / 'cut'}")
    for left in ("lorakit.json", "adapter_model.safetensors", "checkpoint-6"):
        path = tmp_path / "cut" / left
        for file in path.iterdir() if path.is_dir() else [path]:
            file.unlink()
    (tmp_path / "cut" / "checkpoint-6").rmdir()
    resumed = lorakit.train(values, f"output_dir={tmp_path / 'cut'}", resume=True)
    assert resumed.eval_loss == whole.eval_loss
    read = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert read[0] == read[1]
