"""A quantisation backend that lorakit does not know is a class and one registered line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

import lorakit
from answered import tokens
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.lora.layers import LoraQuantizedLinear
from lorakit.models.quantization.backend import Backend
from lorakit.weight_formats import FORMATS, dequantized, register
from small_runs import recipe


class Rows8(nn.Parameter):
    """Whole numbers of 8 bits (d_out, d_in), and a scale for every row."""

    scale: torch.Tensor


class Rows8Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantized(self.weight, dtype=x.dtype), self.bias)


class Rows8Backend(Backend):
    name = "rows8"
    types = ("rows8",)

    def recognises(self, weight: object) -> bool:
        return isinstance(weight, Rows8)

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        return weight.data.to(dtype or torch.float32) * weight.scale.to(dtype or torch.float32)

    def config(self, type: str, dtype: torch.dtype, whole: list[str], **options: Any) -> Any:
        return Rows8Config()


class Rows8Config(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = "rows8"


class Rows8Quantizer(HfQuantizer):
    is_trainable = is_serializable = True
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.whole = get_keys_to_not_convert(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, layer in model.named_modules():
            if type(layer) is nn.Linear and name not in self.whole:
                scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
                weight = Rows8((layer.weight / scale).round().to(torch.int8), requires_grad=False)
                layer.__class__, layer.weight, weight.scale = Rows8Linear, weight, scale
        return model


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    register_quantization_config("rows8")(Rows8Config)
    register_quantizer("rows8")(Rows8Quantizer)
    added = register(Rows8Backend())
    yield
    FORMATS.remove(added)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_it_trains_answers_and_merges(tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"what is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    values = recipe(tiny_model, rows, tmp_path / "run") | {"quantization": "rows8"}
    result = lorakit.train(values, quiet=True)
    assert result.eval_loss < result.manifest.base_eval_loss
    assert result.manifest.recipe["quantization"]["type"] == "rows8"
    assert result.manifest.base_fingerprint

    model, _ = lorakit.load_model(str(tiny_model), "float32", quantization="rows8")
    packed = [layer for layer in model.modules() if isinstance(layer, Rows8Linear)]
    assert len(packed) == 14  # seven in each of two layers, and not the head
    model = lorakit.PeftModel.from_pretrained(model, result.output_dir).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraQuantizedLinear)]
    assert all(isinstance(layer.base_weight, Rows8) for layer in layers)
    assert len(layers) == 14
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    found = logits(model, ids)

    engine = open_engine(None, {"one": result.output_dir}, dtype="float32")
    try:
        answer = tokens(
            engine.submit(ids[0].tolist(), "one", Sampling(max_new_tokens=6, logprobs=0))
        )
    finally:
        engine.close()
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert answer == expected[0, 5:].tolist()

    with pytest.warns(UserWarning, match="a layer of rows8 leaves its weight unpacked"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), found, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), found)

    assert lorakit.merge(result.output_dir, tmp_path / "merged").passed
    merged, _ = lorakit.load_model(str(tmp_path / "merged"), "float32")
    torch.testing.assert_close(logits(merged, ids), found, rtol=1e-4, atol=1e-4)
