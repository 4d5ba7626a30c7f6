"""What a base model's files hold: configuration, weights, tokenizer, chat templates.

`Layout` reads transformers' own form. Every other one is a subclass of `ForeignLayout`, which says
what its files mean in transformers' words. Where a name leads is decided before (`names.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.models.layouts.processors import has_processor, load_processor
from lorakit.models.remote_code import needed_code_refused, trusted
from lorakit.models.shards import (
    NewTensor,
    ShardReader,
    StoredTensor,
    all_tensors,
    read_shards,
    usual_dtype,
)
from lorakit.models.template_files import Templates, copy_additional, read_templates

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig

    from lorakit.models.layouts.module_names import ModuleNames

HUB_OPTIONS = (
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"),
    *("variant", "use_safetensors", "trust_remote_code", "code_revision", "weights_only"),
    "use_fast",
)
"""Options of `from_pretrained` that say where files are, or whose code is run."""

_CAUSAL = "AutoModelForCausalLM"
# What goes with a model's weights; the rest of a folder is for other frameworks, or tells of it.
_SMALL = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_NOT_COPIED = {"config.json", "adapter_config.json", "lorakit.json"}
# What tools for quantised weights wrote beside them: a merged model is not quantised.
_NOT_COPIED |= {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
_LICENCES = ("LICENSE", "NOTICE", "MODEL_LICENSE")


class Layout:
    """The files at `path` in transformers' own layout; other layouts override what differs.

    Attributes:
        title: what messages call the layout.
        is_native: transformers reads the files as they are.
        packing: the form in which all weights are packed until they are read; empty for none.
        reads_pickles: weights may be torch's `.bin` files, of which only tensors are read.
        names: the module names of the layout's own code, if adapters are trained on that.
    """

    title: ClassVar[str] = "transformers' layout"
    is_native: ClassVar[bool] = True
    packing: ClassVar[str] = ""
    reads_pickles: ClassVar[bool] = False
    names: ClassVar[ModuleNames | None] = None

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the files at `path` are in this layout."""
        return True

    def config(self, **options: Any) -> PreTrainedConfig:
        """transformers' configuration; `options` take the place of its own values.

        Raises:
            InputError: the files are damaged, or need code of their own. What transformers raises
                is of many kinds.
        """
        from transformers import AutoConfig

        return self._loaded(AutoConfig, options)

    def model(self, form: str, **options: Any) -> Any:
        """What `form`, one of transformers' classes, loads with the `options` of `from_pretrained`.

        Raises InputError as `config` does, and where the model has no such form.
        """
        import transformers

        return self._loaded(getattr(transformers, form), options)

    def tokenizer(self, **options: Any) -> Any:
        """The tokenizer; raises InputError as `config` does."""
        from transformers import AutoTokenizer

        try:
            tokenizer = self._loaded(AutoTokenizer, options)
        except (TypeError, AttributeError) as error:  # JSON of another form than it asks for
            raise InputError(
                f"the tokenizer in {self.path} is damaged: copy or save it again"
            ) from error
        if not tokenizer.chat_template and "chat_template" not in options:
            tokenizer.chat_template = read_templates(self.path)  # it may be the processor's
        return tokenizer

    def processor(self) -> Any:
        """The processor of a model that reads pictures; None where the files hold none."""
        if not has_processor(self.path):
            return None
        return load_processor(self.path, lambda kind: self._loaded(kind, {}))

    def _loaded(self, kind: Any, options: dict[str, Any]) -> Any:
        with needed_code_refused(self.path):
            return kind.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=trusted(), **options
            )

    def templates(self) -> Templates | None:
        """The chat templates, None where there are none; InputError for an unreadable file."""
        return read_templates(self.path)

    def shards(self) -> dict[str, dict[str, StoredTensor]]:
        """Where every tensor lies, by the name that transformers gives it, and by a file's name.

        The files are those in which a merged model is written.
        """
        return read_shards(self.path)

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights as the configuration names it; float32 when it does not."""
        import torch

        return getattr(self.config(), "dtype", None) or torch.float32

    def stored(self) -> tuple[str | None, int, list[str]]:
        """The usual dtype of the weights, the bytes of their files, and what is odd about them."""
        files = self.weight_files()
        if not files:
            pickles = [f for kind in ("*.bin", "*.pt", "*.pth") for f in self.path.glob(kind)]
            why = "pickles only, which are not loaded" if pickles else "no weights here"
            return None, sum(file.stat().st_size for file in pickles), [why]
        usual = str(usual_dtype(all_tensors(self.shards()).values())).removeprefix("torch.")
        return usual, sum(file.stat().st_size for file in files), []

    def weight_files(self) -> list[Path]:
        """The files that hold the weights; none where they are not read tensor by tensor."""
        return [*self.path.glob("*.safetensors")]

    def lacks_weights(self) -> bool:
        """Whether the folder is known to hold no weights yet, only what goes with them."""
        return False

    def write_companions(self, folder: Path, without: Collection[str] = ()) -> None:
        """Writes what goes with the weights (tokenizer, generation settings, licences) to `folder`.

        Args:
            without: names of files to leave out.
        """
        for path in sorted(self.path.iterdir()):
            small = path.suffix in _SMALL or path.name.startswith(_LICENCES)
            left_out = path.name in _NOT_COPIED or path.name.endswith(".index.json")
            if not small or left_out or path.name in without:
                continue
            if path.is_symlink() and not path.exists():
                raise InputError(f"model: {path} is a link that leads nowhere, or in a circle")
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        copy_additional(self.path, folder)


@dataclass(frozen=True)
class TensorSource:
    """A tensor whose values are read, into a memory of their own, by `source[...]`.

    transformers loads a model out of objects that can do this, as safetensors' own slices can.
    """

    tensor: NewTensor
    read: Callable[[], torch.Tensor]

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.read()[key]


class ForeignLayout(Layout):
    """Files that transformers cannot read, and the model of transformers' that they hold.

    A subclass says `recognises`, `config`, and `shards` under transformers' names. Where the
    weights are not safetensors, `sources` takes the place of `shards`; where the tokenizer's files
    are not transformers', `tokenizer`.
    """

    is_native = False
    head: ClassVar[str] = "lm_head.weight"
    """The tensor that a form of the model without an output layer has no place for."""

    @property
    def kind(self) -> str:
        """Which model it is, where a layout has several."""
        return self.path.name

    @contextmanager
    def sources(self) -> Iterator[dict[str, dict[str, TensorSource]]]:
        """Every tensor by file and transformers' name; within the block its values can be read."""
        shards = self.shards()
        with ShardReader(tensor.path for tensor in all_tensors(shards).values()) as reader:
            yield {
                file: {name: TensorSource(t, partial(reader.read, t)) for name, t in own.items()}
                for file, own in shards.items()
            }

    def generation_config(self) -> GenerationConfig | None:
        """Where the model stops writing; None for transformers' defaults."""
        return None

    def model(self, form: str = _CAUSAL, **options: Any) -> Any:
        import transformers

        own = self.config()
        fields = {*own.to_dict(), "id2label", "label2id", "num_labels"} - {"dtype", "torch_dtype"}
        given = {name: options.pop(name) for name in list(options) if name in fields}
        config = options.pop("config", None) or (self.config(**given) if given else own)
        try:
            kind = getattr(transformers, form)._model_mapping[type(config)]
        except KeyError as error:
            family = type(config).__name__.removesuffix("Config").upper()
            raise InputError(
                f"model: {self.path} is a {family}, which transformers has no {form} of"
            ) from error
        for name in HUB_OPTIONS:
            options.pop(name, None)
        legacy = options.pop("torch_dtype", None)
        dtype = options.pop("dtype", legacy)
        with self.sources() as files:
            sources = {name: one for tensors in files.values() for name, one in tensors.items()}
            if dtype in (None, "auto"):
                dtype = usual_dtype(one.tensor for one in sources.values())
            if form != _CAUSAL:
                sources.pop(self.head, None)
            loaded = kind.from_pretrained(
                None, config=config, state_dict=sources, dtype=dtype, **options
            )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(self.path)
        if form == _CAUSAL and (settings := self.generation_config()):
            model.generation_config = settings
        return loaded

    def templates(self) -> Templates | None:
        return self.tokenizer().chat_template

    def weight_files(self) -> list[Path]:
        return sorted({tensor.path for tensor in all_tensors(self.shards()).values()})

    def write_companions(self, folder: Path, without: Collection[str] = ()) -> None:
        self.tokenizer().save_pretrained(folder)
        if settings := self.generation_config():
            settings.save_pretrained(folder)
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(_LICENCES) and path.is_file():
                shutil.copyfile(path, folder / path.name)


def stored_values(folder: Path) -> dict[str, Any]:
    """What `config.json` in `folder` says; nothing where it cannot be read."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}  # whoever needs it says what is wrong with it
    return values if isinstance(values, dict) else {}
