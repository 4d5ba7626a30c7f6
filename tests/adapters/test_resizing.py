"""A resized adapter is the best approximation of its ranks, for PEFT too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.open import open_adapter
from lorakit.adapters.resize import resize
from lorakit.adapters.spectrum import spectra
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_adapter
from random_adapters import change, logits, make_adapter


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_rslora": True},
        {
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"v_proj": 3},
            "modules_to_save": ["lm_head"],
        },
    ],
)
def test_a_share_of_the_energy_decides_every_modules_rank(
    fields: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    adapter = make_adapter(tiny_model, tmp_path / "a", r=8, **fields)
    report = resize(adapter, tmp_path / "small", energy=0.8)
    assert report.after < report.before
    before, _ = spectra(*read_adapter(adapter))
    after, _ = spectra(*read_adapter(tmp_path / "small"))
    assert {s.path: s.r for s in after} == {s.path: s.directions(0.8) for s in before}
    assert len({s.r for s in after}) > 1
    assert {s.scaling for s in after} == {1.0}
    lost = total = 0.0
    wanted, found = change(tiny_model, adapter), change(tiny_model, tmp_path / "small")
    kept = {f"{s.path}.weight": s.r for s in after}
    for name, delta in wanted.items():
        if name not in kept:
            torch.testing.assert_close(found[name], delta)
            continue
        squares = torch.linalg.svdvals(delta.double()).square()
        error = (found[name] - delta).double().square().sum().item()
        best = squares[kept[name] :].sum().item()
        assert error == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert error <= 0.2 * squares.sum() * (1 + 1e-6)
        lost, total = lost + error, total + squares.sum().item()
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    ids = torch.arange(40)[None] * 5 % 259
    with torch.no_grad():
        ours = open_adapter(tmp_path / "small", dtype="float32").model(ids).logits
    torch.testing.assert_close(ours, logits(tiny_model, tmp_path / "small"), rtol=1e-4, atol=1e-5)


def test_all_energy_and_the_same_rank_keep_the_adapter(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "a", lora_alpha=11)
    expected = logits(tiny_model, adapter)
    resize(adapter, tmp_path / "b", energy=1.0)
    resize(adapter, tmp_path / "c", rank=4)
    for name in "bc":
        torch.testing.assert_close(
            logits(tiny_model, tmp_path / name), expected, rtol=1e-4, atol=1e-5
        )


def test_dora_keeps_its_lengths_and_says_so(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "a", use_dora=True)
    report = resize(adapter, tmp_path / "b", rank=4)
    assert "DoRA" in report.notices[0]
    expected = logits(tiny_model, adapter)
    torch.testing.assert_close(logits(tiny_model, tmp_path / "b"), expected, rtol=1e-4, atol=1e-4)


def test_pissa_becomes_an_ordinary_adapter_of_what_it_changed(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "a", init_lora_weights="pissa")
    resize(adapter, tmp_path / "b", rank=8)
    ids = torch.arange(40)[None] * 5 % 259
    with torch.no_grad():
        expected = open_adapter(adapter, dtype="float32").model(ids).logits
    torch.testing.assert_close(logits(tiny_model, tmp_path / "b"), expected, rtol=1e-3, atol=1e-4)


def test_a_size_that_cannot_be_is_refused_and_nothing_is_written(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "a")

    def refusal(folder: Path = adapter, **size: Any) -> str:
        with pytest.raises(InputError) as error:
            resize(folder, tmp_path / "out", **size)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "either --rank or --energy" in refusal()
    assert "either --rank or --energy" in refusal(rank=1, energy=0.5)
    assert "at least 1, not 0" in refusal(rank=0)
    assert "more than any module has: the largest is 4" in refusal(rank=5)
    for energy in (0, -1, 1.1, float("nan")):
        assert "share in (0, 1]" in refusal(energy=energy)
    assert "holds no adapter" in refusal(tiny_model, rank=1)
    with pytest.raises(InputError, match="already exists"):
        resize(adapter, adapter, rank=1)
