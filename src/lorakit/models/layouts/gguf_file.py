"""A causal language model in one GGUF file, whose packed weights become plain ones when read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.forms import FORMS
from lorakit.models.layouts.layout import Layout
from lorakit.progress import track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from lorakit.models.shards import StoredTensor
    from lorakit.models.template_files import Templates


class GGUFFile(Layout):
    """The file at `path`."""

    title = "a GGUF file"
    packing = "GGUF"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_file()

    def config(self, **options: Any) -> PreTrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path.parent, **self._place(), **options)

    def model(self, form: str, **options: Any) -> Any:
        """As `Layout.model`; a `quantization_config` quantises the unpacked weights again."""
        task_type = next((task for task, own in FORMS.items() if own == form), form)
        if task_type != "CAUSAL_LM":
            raise InputError(
                f"model: {self.path} is a GGUF file, which holds a causal language model: give a "
                f"model's folder for lora.task_type {task_type}"
            )
        info = options.pop("output_loading_info", False)
        model = self._unpacked(options.pop("dtype"))
        if options.get("quantization_config"):
            loaded = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=dict(model.state_dict()),
                dtype=model.dtype,
                **options,
            )
            loaded.generation_config = model.generation_config
            model = loaded
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
        return (model, nothing) if info else model

    def _unpacked(self, dtype: str | torch.dtype) -> Any:
        import transformers

        # Newer releases keep the weights packed, which cannot be trained, unless told otherwise.
        packed = getattr(transformers, "GgufConfig", None)
        plain = {"quantization_config": packed(dequantize=True)} if packed else {}
        with _counted():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.path.parent, dtype=dtype, **self._place(), **plain
            )
        # The weights are plain now; with these marks left transformers would refuse to save them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        return model

    def tokenizer(self, **options: Any) -> Any:
        from transformers import AutoTokenizer

        with _counted():
            return AutoTokenizer.from_pretrained(self.path.parent, **self._place(), **options)

    def _place(self) -> dict[str, Any]:
        return {"gguf_file": self.path.name, "local_files_only": True}

    def templates(self) -> Templates | None:
        try:
            return _template(self.path, self.path.stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error

    def shards(self) -> dict[str, dict[str, StoredTensor]]:
        raise InputError(
            f"model: {self.path} is a GGUF file, whose tensors are packed: give a folder with "
            "safetensors"
        )

    def stored_dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def stored(self) -> tuple[str | None, int, list[str]]:
        from gguf import GGUFReader

        numbers: Counter[str] = Counter()
        for tensor in GGUFReader(self.path).tensors:
            numbers[tensor.tensor_type.name] += int(tensor.n_elements)
        return numbers.most_common(1)[0][0], self.path.stat().st_size, []


@lru_cache(maxsize=8)  # gguf reads the whole vocabulary too, for seconds
def _template(path: Path, changed: int) -> str | None:
    """The chat template in the file, which was `changed` then."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.chat_template")
    return None if field is None else str(field.contents())


@contextmanager
def _counted() -> Iterator[None]:
    """Counts the tensors of a GGUF file as a task: transformers' own bar fills logs."""
    from transformers import modeling_gguf_pytorch_utils as reading

    bar = reading.tqdm
    reading.tqdm = lambda tensors, **options: track(tensors, "unpacking tensors")
    try:
        yield
    finally:
        reading.tqdm = bar
