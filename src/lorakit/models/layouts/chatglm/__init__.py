"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout in which they were published.

Their folders ask for Python code of their own (`model_type: chatglm`), which is never run: the
model is transformers' GLM, with the same weights under its names. `original.py` reads the
configuration, `weights.py` the tensors; the tokenizers are in `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.models.layouts.chatglm.original import (
    MODEL_TYPE,
    Original,
    native_config,
    read_original,
)
from lorakit.models.layouts.chatglm.tokenizer import generation_settings, original_tokenizer
from lorakit.models.layouts.chatglm.weights import NAMES, bin_sources, native_shards
from lorakit.models.layouts.layout import ForeignLayout, TensorSource, stored_values
from lorakit.models.shards import INDEX_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

    from lorakit.models.shards import StoredTensor


class ChatGLM(ForeignLayout):
    """The folder at `path`, as it was published."""

    title = "ChatGLM's original layout"
    reads_pickles = True  # chatglm2-6b has `.bin` files alone
    names = NAMES

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return stored_values(path).get("model_type") == MODEL_TYPE

    @cached_property
    def original(self) -> Original:
        """The folder's own configuration, checked."""
        return read_original(self.path)

    @property
    def kind(self) -> str:
        return f"{self.original.generation.value} as transformers' GLM"

    def config(self, **options: Any) -> PreTrainedConfig:
        return native_config(self.original, **options)

    def tokenizer(self, **options: Any) -> Any:
        return original_tokenizer(self.original, **options)

    def generation_config(self) -> GenerationConfig:
        return generation_settings(self.original)

    def shards(self) -> dict[str, dict[str, StoredTensor]]:
        return native_shards(self.original, self._has_safetensors)

    def weight_files(self) -> list[Path]:
        return [*self.path.glob("*.safetensors")]

    def lacks_weights(self) -> bool:
        return not self._has_safetensors and not any(self.path.glob("*.bin"))

    @property
    def _has_safetensors(self) -> bool:
        """Whether the weights are safetensors, which are then the ones that are read."""
        return any((self.path / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))

    @contextmanager
    def sources(self) -> Iterator[dict[str, dict[str, TensorSource]]]:
        if not self._has_safetensors:
            yield bin_sources(self.original)
            return
        with super().sources() as files:
            yield files
