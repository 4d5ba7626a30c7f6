"""One adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, as PEFT has them.

Here are reading with every check, and atomic writing. Of a pickle, as PEFT wrote until 2023,
tensors are read and nothing else.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from lorakit import atomic
from lorakit.errors import BASE_OPTION, InputError, listed
from lorakit.lora.architecture import without_wrappers
from lorakit.lora.config import LoraConfig
from lorakit.lora.key_names import PREFIX, as_peft_names
from lorakit.lora.layers import LoraLayer
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME, PICKLED_NAME, WEIGHTS_NAME
from lorakit.lora.tensor_files import read_tensors
from lorakit.lora.wrapping import adapter_modules

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by the keys that PEFT's files have."""

_CURE = f"give the model that it was trained on ({BASE_OPTION})"
_ANOTHER = "is an adapter for another base model"


class LoadResult(NamedTuple):
    """The keys that did not fit, as `torch.nn.Module.load_state_dict` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_parameters(model: nn.Module, name: str, bias: str = "none") -> dict[str, torch.Tensor]:
    """The tensors of adapter `name`, under the keys that PEFT's files have.

    They are the model's own: parameters, and the buffers of `modules_to_save`.

    Args:
        model: the wrapped model itself (`LoraModel.get_base_model()`).
        bias: `LoraConfig.bias`; trained biases belong to the adapter too.
    """
    found: dict[str, torch.Tensor] = {}
    for path, module in adapter_modules(model, name):
        for ending, tensor in module.adapter_tensors(name).items():
            found[f"{PREFIX}{path}.{ending}"] = tensor
        if bias != "lora_only" or not isinstance(module, LoraLayer) or name not in module.r:
            continue
        if (base_bias := module.base_bias) is not None:
            found[f"{PREFIX}{path}.base_layer.{module.bias_name}"] = base_bias
    if bias == "all":
        for key, parameter in model.named_parameters():
            if key.rpartition(".")[2] == "bias" and ".modules_to_save." not in f".{key}":
                found[f"{PREFIX}{without_wrappers(key)}"] = parameter
    return found


def write_adapter(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes an adapter's two files, each in one step, into `folder` (made if missing).

    The saved configuration has `inference_mode` set, as PEFT saves it.

    Args:
        initial: initial factors that belong to the adapter, for a third file.

    Raises:
        InputError: a tensor is empty, as the shards of other processes are (ZeRO-3).
    """
    folder = Path(folder)
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise InputError(
                f"{key} is empty here, so its values are on other processes: gather it"
            )
    text = config.to_json(inference_mode=True)
    # A folder counts as an adapter only with a configuration. So another one goes first and the
    # new one comes last: at no moment do weights stand beside a configuration not their own.
    old = folder / CONFIG_NAME
    if old.is_file() and old.read_bytes() != text.encode():
        old.unlink()
    if initial:
        atomic.write_file(folder / INITIAL_NAME, save(_apart(initial), metadata={"format": "pt"}))
    else:
        (folder / INITIAL_NAME).unlink(missing_ok=True)
    atomic.write_file(folder / WEIGHTS_NAME, save(_apart(tensors), metadata={"format": "pt"}))
    atomic.write_file(folder / CONFIG_NAME, text)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies: tensors that are tied to each other are written under each of their names."""
    return {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor` where it is spread over processes (FSDP2), which all of them must ask for."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread_like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, whole in every process, spread over processes as `parameter` is, if it is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(values.to(parameter.device), mesh, parameter.placements)


def read_config(folder: str | Path) -> LoraConfig:
    """The configuration of the adapter in `folder`.

    Raises:
        InputError: it is not an adapter's folder, or its configuration cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give an adapter's folder (with {CONFIG_NAME})")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it")
    return LoraConfig.from_json_file(folder / CONFIG_NAME)


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of the adapter in `folder`, under PEFT's keys.

    Raises:
        InputError: a file is missing or damaged, or holds more than tensors.
    """
    config = read_config(folder)
    tensors = as_peft_names(_load(weights_file(folder)), config.bias, folder)
    return config, _once(tensors)


def weights_file(folder: str | Path) -> Path:
    """The file of an adapter's tensors in `folder`: safetensors, or else the older pickle.

    Raises:
        InputError: there is neither.
    """
    for name in (WEIGHTS_NAME, PICKLED_NAME):
        if (path := Path(folder) / name).is_file():
            return path
    raise InputError(f"{folder} holds no {WEIGHTS_NAME}")


def _once(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` without the doubles that PEFT writes of a module that is trained whole and resized.

    Beside the trained weight there are the frozen one and, by another name, the trained one again.
    """
    plain = {key: re.sub(r"\.(modules_to_save|original_module)\.", ".", key) for key in tensors}
    return {key: t for key, t in tensors.items() if plain[key] == key or plain[key] not in tensors}


def read_initial(folder: str | Path) -> dict[str, torch.Tensor]:
    """The initial factors in `folder`, by layer's path and `.A` or `.B`; empty without a file."""
    path = Path(folder) / INITIAL_NAME
    return _load(path) if path.is_file() else {}


def _load(path: Path) -> dict[str, torch.Tensor]:
    tensors = read_tensors(path)
    for key, tensor in tensors.items():
        floating = tensor.is_floating_point()
        if (floating and tensor.itemsize == 1) or (not floating and "lora_" in key):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: {key} is {dtype}, and an adapter is float16, bfloat16, float32 or "
                "float64: save it in one of these"
            )
    return tensors


def initial_factors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The initial factors of adapter `name`, where they are subtracted from its update."""
    return {
        f"{path}.{factor}": getattr(layer.lora_initial[name], factor)
        for path, layer in adapter_modules(model, name)
        if isinstance(layer, LoraLayer) and name in layer.lora_initial
        for factor in ("A", "B")
    }


def load_initial(
    model: nn.Module,
    name: str,
    initial: Mapping[str, torch.Tensor],
    config: LoraConfig,
    folder: str | Path,
) -> None:
    """Gives adapter `name` the initial factors that were saved with it.

    A folder without them is PEFT's: there they come out of the weight again, and the layers have
    done that already.

    Raises:
        InputError: they cannot be computed again, or are for another model.
    """
    if not initial:
        if config.init.kind.subtracted and not config.init.kind.repeatable:
            raise InputError(
                f"{folder} has no {INITIAL_NAME}, and {config.init_lora_weights} does not give "
                "the same ones again: save it with path_initial_model_for_weight_conversion where "
                "it was trained"
            )
        return
    load_tensors(initial_factors(model, name), initial, folder)


def load_tensors(
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    folder: str | Path,
) -> None:
    """Copies an adapter's `tensors` into `parameters`; every key on both sides must be used.

    Nothing is copied before everything is known to fit.

    Raises:
        InputError: a key or a shape does not fit; it says of which kind that is.
    """
    own, theirs = (
        {key: tuple(tensor.shape) for key, tensor in one.items()} for one in (parameters, tensors)
    )
    if why := _misfit(own, theirs):
        raise InputError(f"{folder} {why}")
    require_finite(tensors, folder)
    with torch.no_grad():
        for key, parameter in parameters.items():
            if parameter.is_meta:
                values = tensors[key].to(parameter.dtype, copy=True)
                loaded = nn.Parameter(values, requires_grad=parameter.requires_grad)
                torch.utils.swap_tensors(parameter, loaded)
            else:
                parameter.copy_(spread_like(parameter, tensors[key]))


def require_finite(tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Raises InputError if the adapter in `folder` holds NaN or Inf."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: {key} holds NaN or Inf")


def same_values(copied: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a copy of `own`, perhaps in a narrower dtype, is one."""
    return torch.equal(copied.to(own), own.to(copied).to(own))


def _misfit(own: Shapes, theirs: Shapes) -> str:
    """Why an adapter does not fit, as the rest of a sentence that begins with its folder.

    Args:
        own: what the model with the adapter's configuration needs.
        theirs: what the file has.

    Returns: nothing where all keys and shapes are the same.
    """
    for key in sorted(own.keys() & theirs.keys()):
        if own[key] != theirs[key]:
            return _wrong_shape(key, own[key], theirs[key], own)
    extra, lacking = sorted(theirs.keys() - own.keys()), sorted(own.keys() - theirs.keys())
    if extra:
        return _unknown(extra, own)
    if lacking:
        return (
            f"lacks {listed(lacking, 3)}, which its adapter_config.json says that it has: it is "
            f"incomplete, or its configuration is of another adapter, or it {_ANOTHER}: {_CURE}"
        )
    return ""


def _wrong_shape(key: str, own: tuple[int, ...], its: tuple[int, ...], all_own: Shapes) -> str:
    shapes = f"{key} has shape {its}, and this model needs {own}"
    if its == own[::-1]:
        return (
            f"holds transposed factors: {shapes}: A must be (r, d_in) and B (d_out, r) (lorakit "
            "import reads mlx-lm's)"
        )
    rank = 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1
    if "lora_" in key and len(own) == len(its) == 2 and own[1 - rank] == its[1 - rank]:
        return (
            f"has other ranks than its configuration says: {shapes} (rank {its[rank]}, not "
            f"{own[rank]}): correct r or rank_pattern in adapter_config.json"
        )
    if re.search(r"lora_embedding_A$|(embed\w*|wte|lm_head|score)\.\w*\.?weight$", key):
        rows = (its[1], own[1]) if key.endswith("lora_embedding_A") else (its[0], own[0])
        if rows[0] != rows[1]:
            return (
                f"{_ANOTHER}, with {rows[0]} tokens where this one has {rows[1]}: {shapes}: {_CURE}"
            )
    return f"{_ANOTHER}, of another width: {shapes}: {_CURE}"


def _unknown(extra: list[str], own: Shapes) -> str:
    layers, mine = _layers(extra), _layers(own)
    if layers and mine and max(layers) > max(mine):
        return (
            f"{_ANOTHER}, with at least {max(layers) + 1} layers where this one has "
            f"{max(mine) + 1}: it has {listed(extra, 3)}: {_CURE}"
        )
    return (
        f"{_ANOTHER}: it has, and this model does not, {listed(extra, 3)}: another "
        f"architecture, or other targets: {_CURE}"
    )


def _layers(keys: Mapping[str, object] | list[str]) -> set[int]:
    """The numbers of the layers in which tensors stand: the first number in each key."""
    return {int(found[1]) for key in keys if (found := re.search(r"\.(\d+)\.", key))}
