"""A layout that lorakit does not know is a class and one registered line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

import lorakit
from lorakit.adapters.foreign import import_adapter
from lorakit.errors import InputError
from lorakit.models.describe import describe
from lorakit.models.layouts import LAYOUTS
from lorakit.models.layouts.convert import convert
from lorakit.models.layouts.layout import ForeignLayout
from lorakit.models.layouts.module_names import ModuleNames
from lorakit.models.shards import WEIGHTS_NAME, StoredTensor, code_of
from plain_adapters import save_adapter
from small_runs import recipe


class Crate(ForeignLayout):
    """A Llama whose numbers lie one after another in `crate.raw`, as `crate.json` says."""

    title = "a crate"
    names = ModuleNames(
        code="the crate's own code",
        models="crates",
        config="LlamaConfig",
        layers="blocks",
        native_layers="model.layers",
        in_layer={f"self_attn.{one}_proj": f"self_attn.{one}_proj" for one in "qkvo"},
        outside={},
    )

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


def test_an_adapter_under_the_names_of_its_own_code_is_imported(
    layout: None, crate: Path, tmp_path: Path
):
    native = save_adapter(crate, tmp_path / "native", target_modules=["q_proj", "v_proj"], r=4)
    tensors = load_file(native / "adapter_model.safetensors")
    theirs = {key.replace("model.layers.", "blocks."): t for key, t in tensors.items()}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "adapter_model.safetensors")
    config = (native / "adapter_config.json").read_text()
    (tmp_path / "theirs" / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="lorakit import"):
        lorakit.merge(tmp_path / "theirs", tmp_path / "merged")
    import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(crate))
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
