"""Cosines and overlaps from factors are those of the whole updates."""

from pathlib import Path

import pytest
import torch

from lorakit.adapters.combine import combine
from lorakit.adapters.diff import diff, overlap
from lorakit.errors import InputError
from random_adapters import change, make_adapter
from tiny import save_tiny_model


def test_norms_and_cosines_are_those_of_the_whole_updates(tiny_model: Path, tmp_path: Path):
    a = make_adapter(tiny_model, tmp_path / "a", lora_alpha=6)
    b = make_adapter(tiny_model, tmp_path / "b", seed=1, r=2, target_modules=["q_proj", "up_proj"])
    combine([a, b], tmp_path / "c", weights=[0.3, 1])
    found = diff(b, tmp_path / "c")
    assert len(found.modules) == 4
    assert len(found.only[1]) == 10
    assert found.only[0] == []
    assert not found.identical
    assert found.settings["r"] == (2, 4)
    ones, others = change(tiny_model, b), change(tiny_model, tmp_path / "c")
    for module in found.modules:
        one, other = (d[f"{module.path}.weight"].double().flatten() for d in (ones, others))
        assert module.norms == pytest.approx((one.norm().item(), other.norm().item()), rel=1e-4)
        expected = torch.dot(one, other) / (one.norm() * other.norm())
        assert module.cosine == pytest.approx(expected.item(), abs=1e-4)
        for value in (module.output_overlap, module.input_overlap):
            assert 0 <= value <= 1 + 1e-9
    names = [f"{m.path}.weight" for m in found.modules]
    one, other = (torch.cat([d[n].double().flatten() for n in names]) for d in (ones, others))
    expected = torch.dot(one, other) / (one.norm() * other.norm())
    assert found.overall().cosine == pytest.approx(expected.item(), abs=1e-4)
    assert [s.name for s in found.by_layer()] == ["layer 0", "layer 1"]
    assert [s.modules for s in found.by_kind()] == [2, 2]


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(20, 3).double()).Q
    turned = U @ torch.linalg.qr(torch.randn(3, 3).double()).Q
    assert overlap(U, turned) == pytest.approx(1)
    assert overlap(
        U, torch.linalg.qr(torch.cat([U, torch.randn(20, 2).double()], dim=1)).Q
    ) == pytest.approx(1)
    apart = torch.linalg.qr(torch.cat([U, torch.randn(20, 3).double()], dim=1)).Q[:, 3:]
    assert overlap(U, apart) == pytest.approx(0, abs=1e-12)
    angle = torch.tensor(0.4).double()
    assert overlap(U, angle.cos() * U + angle.sin() * apart) == pytest.approx(
        angle.cos().item() ** 2
    )


def test_an_adapter_and_itself_and_its_opposite(tiny_model: Path, tmp_path: Path):
    a = make_adapter(tiny_model, tmp_path / "a")
    same = diff(a, a)
    assert same.identical
    assert same.settings == {}
    assert all(m.cosine == pytest.approx(1) for m in same.modules)
    assert all(m.output_overlap == pytest.approx(1) for m in same.modules)
    combine([a], tmp_path / "b", weights=[-0.5])
    found = diff(a, tmp_path / "b")
    assert not found.identical
    assert all(m.cosine == pytest.approx(-1) for m in found.modules)
    assert all(m.input_overlap == pytest.approx(1) for m in found.modules)


def test_what_cannot_be_compared_is_refused(tiny_model: Path, tmp_path: Path):
    a = make_adapter(tiny_model, tmp_path / "a", target_modules=["q_proj"])
    b = make_adapter(tiny_model, tmp_path / "b", target_modules=["v_proj"])
    with pytest.raises(InputError, match="no module in common"):
        diff(a, b)
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(InputError, match="different base models"):
        diff(a, make_adapter(wide, tmp_path / "c"))
    with pytest.raises(InputError, match="holds no adapter"):
        diff(a, tiny_model)
