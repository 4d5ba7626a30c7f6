"""A layout that lorakit does not know is a class and one registered line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig

import lorakit
from lorakit.errors import InputError
from lorakit.models.describe import describe
from lorakit.models.layouts import LAYOUTS
from lorakit.models.layouts.convert import convert
from lorakit.models.layouts.layout import ForeignLayout
from lorakit.models.shards import WEIGHTS_NAME, StoredTensor, code_of
from small_runs import recipe


class Crate(ForeignLayout):
    """A Llama whose numbers lie one after another in `crate.raw`, as `crate.json` says."""

    title = "a crate"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return (path / "crate.json").is_file()

    @property
    def values(self) -> Any:
        return json.loads((self.path / "crate.json").read_text())

    def config(self, **options: Any) -> LlamaConfig:
        return LlamaConfig(**self.values["sizes"] | options)

    def shards(self) -> dict[str, dict[str, StoredTensor]]:
        raw = self.path / "crate.raw"
        found = {
            name.replace("blocks.", "model.layers."): StoredTensor(code, tuple(shape), raw, *place)
            for name, (code, shape, place) in self.values["tensors"].items()
        }
        return {WEIGHTS_NAME: found}


@pytest.fixture
def layout() -> Iterator[None]:
    LAYOUTS.append(Crate)
    yield
    LAYOUTS.remove(Crate)


@pytest.fixture(scope="module")
def crate(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crate")
    sizes = json.loads((tiny_model / "config.json").read_text())
    tensors, begin = {}, 0
    with (folder / "crate.raw").open("wb") as file:
        for name, tensor in load_file(tiny_model / "model.safetensors").items():
            end = begin + file.write(tensor.numpy().tobytes())
            own = name.replace("model.layers.", "blocks.")
            tensors[own] = (code_of(tensor.dtype), tensor.shape, (begin, end))
            begin = end
    (folder / "crate.json").write_text(json.dumps({"sizes": sizes, "tensors": tensors}))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def logits(path: Path) -> torch.Tensor:
    model, _ = lorakit.load_model(str(path), "float32")
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_it_is_described_trained_merged_and_converted(
    layout: None, crate: Path, tiny_model: Path, tmp_path: Path
):
    facts = describe(str(crate))
    assert (facts.family, facts.dtype) == ("llama", "float32")
    assert torch.equal(logits(crate), logits(tiny_model))
    rows = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"what is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    runs = {}
    for name, base in (("crate", crate), ("plain", tiny_model)):
        result = lorakit.train(recipe(base, rows, tmp_path / name, max_steps=2), quiet=True)
        report = lorakit.merge(result.output_dir, tmp_path / f"{name} merged")
        assert report.passed
        assert report.streamed
        runs[name] = result.manifest
    assert runs["crate"].base_fingerprint == runs["plain"].base_fingerprint
    merged = [load_file(tmp_path / f"{name} merged" / WEIGHTS_NAME) for name in runs]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    convert(crate, tmp_path / "native")
    assert torch.equal(logits(tmp_path / "native"), logits(crate))


def test_without_its_line_it_is_no_model(crate: Path):
    with pytest.raises(InputError, match=r"there is no config\.json"):
        lorakit.load_model(str(crate))
