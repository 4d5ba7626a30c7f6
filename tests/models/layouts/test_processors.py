"""Processors of models that read pictures, without torchvision and with one that does not load."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.models.layouts.layout import Layout
from lorakit.models.layouts.processors import load_processor
from picture_families import FAMILIES
from tiny_pictures import save_files

without_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)


def test_a_torchvision_of_another_build_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyPI's build for GPUs beside a torch for processors: a common trouble with transformers."""
    (tmp_path / "torchvision").mkdir()
    code = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    def load(kind: Any) -> Any:
        raise RuntimeError("Failed to import transformers.models.auto.processing_auto")

    with pytest.raises(ImportError, match=r"torchvision::nms does not exist\): install the build"):
        load_processor(tmp_path, load)

    def fail(**_: Any) -> None:
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'")

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["lorakit", "train"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "torchvision::nms does not exist): install the build" in capsys.readouterr().err


@without_torchvision
def test_a_processor_that_has_no_part_for_pillow_asks_for_torchvision(tmp_path: Path) -> None:
    save_files(FAMILIES["Llama 4"], tmp_path)
    with pytest.raises((ImportError, ValueError, OSError), match=r"(?s)Llama4.*torchvision"):
        Layout(tmp_path).processor()


@without_torchvision
@pytest.mark.parametrize("name", ["Pixtral", "Qwen3-VL", "MiniCPM-V 4.6"])
def test_a_processor_that_asks_for_torchvision_beside_pillow_does_without(
    name: str, tmp_path: Path
) -> None:
    save_files(FAMILIES[name], tmp_path)
    processor = Layout(tmp_path).processor()
    assert type(processor).__name__ == FAMILIES[name].processor
    assert type(processor.image_processor).__name__ == f"{FAMILIES[name].images}Pil"
