"""Features of pictures kept in training: the same adapter, and each picture is computed once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.engine.vision_boundary import VisionBoundary
from lorakit.lora.parts import part_prefixes
from lorakit.models.loaded import base_model
from lorakit.training.kept_pictures import TrainingPictures, pictures_kept
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from lorakit.training.trainer import LoraTrainer
from matrix import few
from picture_families import FAMILIES
from tiny_pictures import COLORS, save_pictures, save_tiny

MIB = 1 << 20


@pytest.fixture(scope="module", params=few([*FAMILIES], "Idefics 3, SmolVLM", "Qwen3-VL"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and rows of five pictures: one of two, and one of text alone."""
    folder = tmp_path_factory.mktemp("kept")
    save_tiny(request.param, folder / "base")
    save_pictures(folder / "shown", 2)
    rows: list[dict[str, Any]] = [
        {"question": "which color?", "answer": name, "image": f"shown/{name}-0.png"}
        for name in COLORS
    ]
    rows += [
        {
            "question": "first <image> then <image>?",
            "answer": "red",
            "images": ["shown/red-0.png", "shown/blue-1.png"],
        },
        {"question": "say red", "answer": "red"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trainer_of(folder: Path, place: Path, epochs: int = 3, **lora: Any) -> LoraTrainer:
    recipe = {
        "model": str(folder / "base"),
        "dtype": "float32",
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0},
        "lora": {"r": 4, "target_modules": "all-linear", **lora},
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "output_dir": str(place),
    }
    return set_up(load_recipe(recipe)).trainer()


def trained(
    folder: Path, place: Path, most_bytes: int, **lora: Any
) -> tuple[dict[str, torch.Tensor], int, TrainingPictures | None]:
    """The adapter; how many times the vision part computed something; and what was kept."""
    trainer = trainer_of(folder, place, **lora)
    calls = counted(trainer)
    with pictures_kept(trainer, most_bytes) as line:
        kept: Any = getattr(trainer.train_dataset.pictures, "__self__", None)
        assert (line is None) == (kept is None)
        trainer.train()
    return trainer.model.adapter_tensors("default"), len(calls), kept


def counted(trainer: LoraTrainer) -> list[int]:
    """Has an entry for each picture or batch of pictures that goes through the first block."""
    calls: list[int] = []
    model: Any = base_model(trainer.model)
    tower = model.get_submodule(part_prefixes(model)["vision"][0])
    block = next(
        (m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m)), [tower]
    )[0]
    first = next((m for m in block.modules() if not [*m.children()]), block)
    first.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_an_adapter_is_the_same_with_features_kept_and_without(
    folder: Path, tmp_path: Path
) -> None:
    wanted, _, off = trained(folder, tmp_path / "off", 0)
    found, _, kept = trained(folder, tmp_path / "kept", MIB)
    assert off is None
    if kept is None:  # a projector that nothing tells from the vision part
        pytest.skip("the vision part of this model has no boundary")
    assert len(kept.kept) == len(kept)
    assert 0 < kept.kept.bytes <= MIB
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    # Where there is no room, they are computed again, to the same bit.
    again, _, little = trained(folder, tmp_path / "little", kept.kept.bytes // 2)
    assert little is not None
    assert 0 < len(little.kept) < len(kept.kept)
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("parts", [["language"], ["language", "projector"]])
def test_the_vision_part_computes_a_picture_once(
    folder: Path, tmp_path: Path, parts: list[str]
) -> None:
    _, calls, kept = trained(folder, tmp_path, MIB, parts=parts)
    if kept is None:
        pytest.skip("the vision part of this model has no boundary")
    assert calls == len(kept)
    if parts != ["language"]:  # of pixels only the shapes are kept
        for number in range(len(kept)):
            _, standing = kept.kept.get(number)
            assert all(x.stride()[-1] == 0 for k, x in standing.items() if k == "pixel_values")


def test_nothing_is_kept_where_the_vision_part_changes_or_pictures_come_once(
    folder: Path, tmp_path: Path
) -> None:
    for options in ({"parts": ["language", "vision"]}, {"epochs": 1}):
        trainer = trainer_of(folder, tmp_path / str(len(options)), **options)
        with pictures_kept(trainer, MIB) as line:
            assert line is None
    trainer = trainer_of(folder, tmp_path / "draws")
    tower = next(VisionBoundary(base_model(trainer.model)).before())
    tower.add_module("drops", torch.nn.Dropout(0.1))
    with pictures_kept(trainer, MIB) as line:
        assert line is None
