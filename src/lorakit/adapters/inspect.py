"""What an adapter is, read from its folder alone, and whether it fits a given base model.

Singular values are `spectrum.py`'s; a run's curves and answers are drawn by `lorakit report`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.added_tokens import add_rows
from lorakit.adapters.chat_template import adapter_template, template_notice
from lorakit.adapters.derived import origin
from lorakit.adapters.layout_names import require_fit
from lorakit.adapters.lineage import chain, standing_on, whereabouts
from lorakit.adapters.manifest import Derivation, Manifest, read_manifest, read_record
from lorakit.adapters.spectrum import Spectrum, spectrum
from lorakit.adapters.updates import COPY, AdapterUpdates, Skipped, read_updates
from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, weights_file
from lorakit.lora.fitting import fitted
from lorakit.models.fingerprint import fingerprint_of_skeleton
from lorakit.models.forms import CLASSIFICATION
from lorakit.models.names import resolve
from lorakit.models.shards import all_tensors
from lorakit.models.skeleton import skeleton

# The share of ‖ΔW‖² whose directions are counted.
SHARE = 0.9

# The fields of the configuration that are shown.
_SETTINGS = (
    *("task_type", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights"),
    *("target_modules", "rank_pattern", "alpha_pattern", "modules_to_save"),
)

# What tools write into the card's tags, or into their own models' names.
_MAKERS = ("unsloth", "axolotl", "llama-factory", "swift", "torchtune", "trl")


@dataclass(frozen=True)
class ModuleFacts:
    """One module's update.

    `norm` is ‖ΔW‖ (Frobenius), `effective_rank` exp of the entropy of the singular values, and
    `directions` how many of the largest hold `SHARE` of ‖ΔW‖².
    """

    path: str
    r: int
    shape: tuple[int, int]
    scaling: float
    norm: float
    effective_rank: float
    directions: int

    @classmethod
    def of(cls, s: Spectrum) -> ModuleFacts:
        """The facts of one spectrum."""
        found = s.norm, s.effective_rank, s.directions(SHARE)
        return cls(s.path, s.r, s.shape, s.scaling, *found)


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that is not a factor: a module trained whole, rows of tokens, DoRA's magnitudes."""

    key: str
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Fit:
    """Whether the adapter fits the base model `base`, and if not, why.

    `same_weights` compares fingerprints: None where the adapter has none, or the base's cannot be
    taken from its files. `added_tokens` is how many tokens more than the base it is for.
    """

    base: str
    fits: bool
    reason: str
    same_weights: bool | None
    added_tokens: int = 0


@dataclass(frozen=True)
class Parent:
    """An adapter that another one came from: `mode` says how, `state` what became of it."""

    path: str
    mode: str
    sha256: str
    state: str


@dataclass(frozen=True)
class Inspection:
    """What is known of an adapter.

    `parameters` are all in its file (copies of base weights are not counted), `bytes` the size of
    the weights' file; `run` are the main facts of the training run or of what it was made of.
    `chat_template` is the SHA-256 of the chat template that it is asked with, None where its
    folder does not say; `notices` tell where its base has another one now. `parents` are the
    adapters that it came from, the nearest first, `stands_on` the frozen ones that it is added to,
    `teacher` the one that it learned from.
    """

    folder: str
    base_model: str | None
    task_type: str | None
    made_by: str
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    target_modules: list[str] | str | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: list[str] | None
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    modules: list[ModuleFacts]
    whole: list[WholeTensor]
    skipped: list[Skipped]
    run: dict[str, Any]
    parents: tuple[Parent, ...] = ()
    stands_on: tuple[str, ...] = ()
    teacher: Parent | None = None
    chat_template: str | None = None
    notices: tuple[str, ...] = ()
    fit: Fit | None = None

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON types."""
        return asdict(self)


def inspect(folder: str | Path, *, base: str | None = None) -> Inspection:
    """Reads the adapter in `folder`.

    Args:
        base: a base model; whether the adapter fits it is found from its configuration, without
            loading it.

    Raises:
        InputError: it is no adapter's folder, it is damaged, or there is no such base.
    """
    file = read_updates(folder)
    config = file.config
    tensors = file.trained()
    skipped = list(file.skipped)
    skipped += [
        Skipped(key.removeprefix(PREFIX), "a copy of the base's weight")
        for key in file.others
        if key.endswith(COPY)
    ]
    named = origin(folder, config).base_model
    notice = ""
    if config.task_type in (None, "CAUSAL_LM"):
        notice = template_notice(folder, base or named)
    return Inspection(
        folder=str(folder),
        base_model=named,
        made_by=_maker(file),
        **{name: getattr(config, name) for name in _SETTINGS},
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=weights_file(file.folder).stat().st_size,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        modules=[ModuleFacts.of(spectrum(update)) for update in file.updates.values()],
        whole=[
            WholeTensor(key.removeprefix(PREFIX), tuple(tensor.shape), tensor.numel())
            for key, tensor in file.others.items()
            if not key.endswith(COPY)
        ],
        skipped=skipped,
        run=_facts(file.folder),
        parents=tuple(
            Parent(one.path, one.mode, one.sha256, state) for one, state in chain(file.folder)
        ),
        stands_on=tuple(one.path for one in standing_on(file.folder)),
        teacher=_teacher(file.folder),
        chat_template=adapter_template(file.folder).digest,
        notices=(notice,) if notice else (),
        fit=fit(folder, base) if base else None,
    )


def _teacher(folder: Path) -> Parent | None:
    manifest = read_manifest(folder)
    if manifest is None or manifest.teacher is None:
        return None
    record = manifest.teacher
    return Parent(record.path, "distilled", record.sha256, whereabouts(record, folder)[1])


def fit(folder: str | Path, base: str) -> Fit:
    """Whether the adapter in `folder` fits the base model `base`: names, shapes, weights.

    The base is built on the meta device and the adapter is put on it with the checks of loading.

    Raises:
        InputError: there is no such base, or no adapter.
    """
    source = resolve(base)
    try:
        adapter = read_files(folder, base)
    except InputError as error:  # it is readable, so it does not say which labels it has
        return Fit(base, False, str(error), None)
    model = skeleton(source.path, adapter.task_type, labels=adapter.labels)
    own, expected = None, adapter.record and adapter.record.base_fingerprint
    if expected:
        with suppress(InputError):  # weights that cannot be read tensor by tensor: a GGUF file
            stored = all_tensors(source.layout.shards())
            # A classifier's new head is not of the base.
            partly = adapter.task_type in CLASSIFICATION
            own = fingerprint_of_skeleton(model, stored, partly=partly)
    try:
        added = add_rows(model, adapter)
        config, own_names, _ = fitted(model, adapter.config, adapter.tensors, {}, folder)
        # Where an adapter starts from does not change which tensors it has.
        plain = dataclasses.replace(config, init_lora_weights=True)
        require_fit(folder, plain, own_names, model)
    except InputError as error:
        return Fit(base, False, str(error), None)
    return Fit(base, True, "", own == expected if own else None, added)


def _maker(file: AdapterUpdates) -> str:
    """Who made it, by what its files say."""
    if record := read_record(file.folder):
        verb = record.made_by if isinstance(record, Derivation) else "train"
        return f"lorakit {record.versions.get('lorakit', '')} ({verb})"
    tags = _tags(file.folder)
    name = str(file.config.base_model_name_or_path or "").lower()
    makers = [maker for maker in _MAKERS if maker in tags or name.startswith(f"{maker}/")]
    version = file.config.peft_version
    if version:
        makers.append(f"PEFT {version}")
    elif "lorakit" in tags:
        makers.append("lorakit")
    return " with ".join(makers) or "unknown (its files do not say)"


def _tags(folder: Path) -> set[str]:
    """The tags of the model card, lower case; none where no card can be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        tags = ModelCard.load(folder / "README.md").data.get("tags")
    except (OSError, ValueError, TypeError, YAMLError):
        return set()
    return {str(tag).lower() for tag in tags} if isinstance(tags, list) else set()


def _facts(folder: Path) -> dict[str, Any]:
    """The main facts of `lorakit.json`; empty without one."""
    record = read_record(folder)
    if isinstance(record, Derivation):
        sources = ", ".join(source.path for source in record.sources)
        return {"made of": sources, **record.options, **record.figures}
    return _run(record) if record else {}


def _run(manifest: Manifest) -> dict[str, Any]:
    training = manifest.recipe.get("training") or {}
    facts: dict[str, Any] = {
        "data": ", ".join(str(d.get("path")) for d in manifest.data if d.get("path")),
        "steps": manifest.steps,
        "epochs": training.get("num_train_epochs"),
        "learning_rate": training.get("learning_rate"),
        "seed": manifest.seed,
        "train_tokens": manifest.train_tokens,
        "base_eval_loss": manifest.base_eval_loss,
        "eval_loss": manifest.eval_loss,
        **{f"eval_{name}": score for name, score in (manifest.eval_scores or {}).items()},
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}
