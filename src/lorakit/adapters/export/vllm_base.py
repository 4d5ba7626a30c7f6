"""The base model as vLLM finds it, and whether an adapter's matrices fit into its modules.

vLLM does not say when an adapter names modules that the model lacks: it answers as the bare base
does (`vllm/lora/model_manager.py`). So that is looked at here, on the model's modules without
their weights, as far as its files are on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.models.layouts import layout_of
from lorakit.models.names import ALIASES, resolve

if TYPE_CHECKING:
    from torch import nn

    from lorakit.adapters.export.vllm import Servable

WITHOUT_LORA = frozenset(
    {
        "BloomForCausalLM",
        "DbrxForCausalLM",
        "ExaoneMoeForCausalLM",
        "FalconForCausalLM",
        "FalconMambaForCausalLM",
        "FlexOlmoForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "Gemma3nForCausalLM",
        "Jais2ForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "MptForCausalLM",
        "OlmoeForCausalLM",
        "StableLmForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Models of transformers that vLLM runs, but without adapters (its page on supported models)."""


@dataclass(frozen=True)
class Base:
    """A base model: its name as users know it, what vLLM is given, and where its files are.

    `folder` is None for a hub id whose files are not on this machine, where nothing of it can
    be checked.
    """

    name: str
    argument: str
    folder: Path | None

    @property
    def is_hub_id(self) -> bool:
        """Whether vLLM finds the model on the hub."""
        return self.folder is None or self.argument != str(self.folder)


def find_base(name: str, revision: str | None = None) -> Base:
    """Finds the model that `name` means; nothing is fetched.

    Raises:
        InputError: there is none, or vLLM cannot serve adapters on it as it lies there.
    """
    from lorakit.models.shards import find_shards

    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        raise InputError(
            f"{name} is a GGUF file, and vLLM serves adapters on safetensors: give --model the "
            "folder or hub id that it was made from"
        )
    hub_like = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name not in ALIASES and hub_like and not path.exists():
        cached = _in_cache(name, revision)
        if cached is not None:
            _require_native(name, cached)
        return Base(name, name, cached)
    folder = resolve(name).path.absolute()
    _require_native(name, folder)
    find_shards(folder)
    return Base(name, str(folder), folder)


def _require_native(name: str, folder: Path) -> None:
    """vLLM reads a foreign layout by code of its own, where modules have other names."""
    layout = layout_of(folder)
    if not layout.is_native:
        raise InputError(
            f"{name} is in {layout.title}, whose modules have other names in vLLM than "
            f"the adapters do: lorakit convert {quoted(name)} -o DIR, and give --model DIR"
        )


def require_lora(base: Base) -> None:
    """Raises InputError if vLLM is known to run this model without adapters only."""
    from lorakit.models.skeleton import read_base_config

    if base.folder is None:
        return
    architectures = read_base_config(base.folder).architectures or []
    without = sorted(WITHOUT_LORA.intersection(architectures))
    if without:
        raise InputError(
            f"vLLM serves {base.name} ({listed(without)}) without adapters only: serve it with "
            "--engine lorakit, or fold one adapter in with lorakit merge ADAPTER -o MODEL"
        )


def fitted_to(servable: Servable, model: nn.Module, base: Base) -> Servable:
    """The adapter under the module names of `model`, as `lorakit export --to vllm` writes it.

    Raises:
        InputError: a module that it changes is not there, has another shape, or is no layer that
            vLLM adapts.
    """
    from torch import nn

    from lorakit.adapters.export.plain import renamed_plain

    plain = renamed_plain(servable.plain, model)
    if plain is not servable.plain:
        reasons = (*servable.needs_copy, "its modules have other names in the base")
        servable = replace(servable, plain=plain, needs_copy=reasons)
    for path, pair in plain.pairs.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise InputError(
                f"{servable.folder} adapts {path}, which {base.name} does not have: it is for "
                "another base model"
            ) from None
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise InputError(
                f"{servable.folder} adapts {path}, a {type(module).__name__}, and vLLM adapts "
                "linear layers and embeddings only: "
                f"lorakit merge {quoted(servable.folder)} -o MODEL"
            )
        shape = (pair.B.shape[0], pair.A.shape[1])
        own = tuple(module.weight.shape)
        if (shape[::-1] if pair.is_embedding else shape) != own:
            raise InputError(
                f"{servable.folder} has {shape[0]} × {shape[1]} for {path}, and that of "
                f"{base.name} is {own[0]} × {own[1]}: it is for another base model"
            )
    return servable


def require_context(length: int, model: Any, base: Base) -> None:
    """Raises InputError for a context that the model has no positions for."""
    from lorakit.models.load import most_tokens

    if (most := most_tokens(model, length)) < length:
        raise InputError(
            f"{base.name} has positions for {most} tokens: give --context-length {most} or less"
        )


def fingerprint(base: Base, model: Any) -> str | None:
    """The fingerprint of the base's weights in its files, None where these do not tell."""
    from lorakit.models.fingerprint import fingerprint_of_skeleton
    from lorakit.models.shards import all_tensors, read_shards

    if base.folder is None or not any(base.folder.glob("*.safetensors")):
        return None  # the cache may hold a hub model's configuration alone
    return fingerprint_of_skeleton(model, all_tensors(read_shards(base.folder)))


def slot_bytes(model: nn.Module, rank: int) -> int:
    """About what one adapter's slot takes of the GPU's memory, with 2 bytes a value.

    A slot has A (rank, d_in) and B (d_out, rank) for every linear layer and expert, adapted or not.
    """
    from torch import nn

    layers = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    experts = (p for p in model.parameters() if p.dim() == 3)
    columns = sum(sum(weight.shape) for weight in layers)
    return 2 * rank * (columns + sum(p.shape[0] * (p.shape[1] + p.shape[2]) for p in experts))


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model's files in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise InputError(f"model: '{name}' is neither a folder nor a hub id") from error
    return Path(found).parent if isinstance(found, str) else None
