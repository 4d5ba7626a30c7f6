"""Loading a base model and its tokenizer, in the dtype that the machine computes fastest.

A task decides which form of the model is loaded, and how many labels its head has. Where a name
leads is `names.py`'s work; adapters are put on by others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pickle import UnpicklingError
from struct import error as StructError
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, first_line, listed
from lorakit.lora.architecture import expert_parameters
from lorakit.models.forms import (
    CLASSIFICATION,
    FORMS,
    causal_form,
    is_bare,
    is_encoder,
    label_options,
)
from lorakit.models.layouts.layout import Layout
from lorakit.models.loaded import base_model
from lorakit.models.names import resolve
from lorakit.models.picture_reader import PictureReader, give_reader, picture_reader
from lorakit.models.quantization.from_files import from_files, require_known
from lorakit.models.quantization.prepare import keep_exact
from lorakit.models.quantization.settings import Quantization, as_quantization, loading_options
from lorakit.models.sentence_pooling import is_embedding_model
from lorakit.models.skeleton import kept_whole, stored_quantization
from lorakit.progress import task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class LoadedModel:
    """A base model in the form that its task needs.

    `new_modules` are the paths of the modules that an adapter has to train whole: a classifier's
    head, and whatever the model's files have no weights for. Empty for a causal language model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: list[str]


def load_model(
    name: str,
    dtype: str | torch.dtype | None = None,
    *,
    device: str | None = None,
    quantization: str | Mapping[str, Any] | Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name` and its tokenizer, ready for use.

    Args:
        name: an alias (`smollm2-135m-instruct`), a folder, a `.gguf` file, or a hub id.
        dtype: `auto` or None for `best_dtype`, or a dtype.
        device: where to; None means a GPU if there is one, else the CPU.
        quantization: `nf4`, `fp4` or `int8`, or a mapping with the fields of `Quantization`, to
            store the weights of linear layers so; None leaves them as the model's files have them.

    Raises:
        InputError: the name leads nowhere, or what lies there cannot be loaded.
    """
    loaded = load_for_task("CAUSAL_LM", name, dtype, device=device, quantization=quantization)
    return loaded.model, loaded.tokenizer


def gives_embeddings(name: str) -> bool:
    """Whether `name` is a model that embeds texts and writes none.

    That is an encoder, or a body without a head that sentence-transformers has made.

    Raises:
        InputError: the name leads nowhere, or its configuration cannot be read.
    """
    source = resolve(str(name))
    if source.layout.packing:
        return False
    config = source.layout.config()
    if config.is_encoder_decoder:
        return False
    return is_encoder(config) or (is_embedding_model(source.path) and is_bare(config))


def load_embedder(
    name: str,
    dtype: str | torch.dtype | None = None,
    *,
    quantization: str | Mapping[str, Any] | Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The body of the model `name`, which gives hidden states, and its tokenizer.

    Raises:
        InputError: as in `load_model`, or the files are a classifier's or lack weights.
    """
    kind = next(iter(resolve(str(name)).layout.config().architectures or ()), "")
    if kind.endswith("Classification"):
        raise InputError(
            f"model: {name} is a classifier ({kind}), which gives no embeddings: give the encoder "
            "that it was made from, or use it by lorakit eval or transformers"
        )
    loaded = load_for_task("FEATURE_EXTRACTION", name, dtype, quantization=quantization)
    if missing := [path for path in loaded.new_modules if not path.startswith("pooler")]:
        raise InputError(
            f"model: {name} lacks {listed(missing, 3)} in its files: copy or fetch the model again"
        )
    return loaded.model, loaded.tokenizer


def is_classifier(name: str) -> bool:
    """Whether the files of `name` are those of a model for sequence classification.

    Raises:
        InputError: the name leads nowhere, or what lies there is one with a decoder.
    """
    source = resolve(str(name))
    if source.layout.packing:
        return False
    config = source.layout.config()
    kind = next(iter(config.architectures or ()), "")
    found = kind.endswith("ForSequenceClassification")
    if found and config.is_encoder_decoder:
        raise InputError(
            f"model: {name} is a classifier with a decoder ({kind}), which is not served: use "
            "transformers"
        )
    return found


def load_classifier(
    name: str,
    dtype: str | torch.dtype | None = None,
    *,
    quantization: str | Mapping[str, Any] | Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The body of the classifier `name`, without its head (`ClassifierForm`), and its tokenizer.

    Raises:
        InputError: as in `load_model`.
    """
    loaded = load_for_task("SEQ_CLS", name, dtype, quantization=quantization)
    body: Any = loaded.model.base_model
    body.config._name_or_path = str(name)
    if (quantizer := getattr(loaded.model, "hf_quantizer", None)) is not None:
        body.hf_quantizer = quantizer
    return body, loaded.tokenizer


def load_for_task(
    task_type: str,
    name: str,
    dtype: str | torch.dtype | None = None,
    *,
    device: str | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
    quantization: str | Mapping[str, Any] | Quantization | None = None,
) -> LoadedModel:
    """The model `name` in its form for `task_type` (a key of `FORMS`), ready for use.

    Args:
        name, dtype, device, quantization: as in `load_model`.
        labels: the names of a classifier's classes; a place in them is a class's number.
        seed: of the weights that the model's files lack, which are always the same ones.

    Raises:
        InputError: as in `load_model`, or the model has no such form.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # loading is a matter of a second
    with task(f"loading {name}"):
        layout = resolve(str(name)).layout
        device = device or best_device()
        chosen = torch_dtype(dtype, device)
        wanted = as_quantization(quantization)
        options = loading_options(wanted, chosen, device)
        with _failures_named(name, task_type):
            if not layout.packing and (stored := stored_quantization(layout.config())):
                require_known(name, str(stored.get("quant_method")))
                if wanted:
                    raise InputError(
                        f"quantization: the weights of {name} are quantised already, and are used "
                        "as they are: leave it out"
                    )
                options["device_map"] = {"": device}  # they are not moved later
            if task_type == "CAUSAL_LM":
                model, lacking = _load_causal(layout, name, chosen, options), set[str]()
            else:
                if wanted and not layout.packing:
                    whole = kept_whole(layout.path, task_type, labels)
                    options = loading_options(wanted, chosen, device, whole)
                model, lacking = _load_form(layout, task_type, chosen, labels, seed, options)
            tokenizer = layout.tokenizer()
            if task_type == "CAUSAL_LM":
                give_reader(tokenizer, _picture_reader(layout, model))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config._name_or_path = str(name)
        new: list[str] = []
        if task_type != "CAUSAL_LM":
            if tokenizer.pad_token_id is None:
                raise InputError(f"model: the tokenizer of {name} has no padding token: add one")
            set_padding(model, tokenizer.pad_token_id)
            new = _new_modules(model, lacking, heads=task_type in CLASSIFICATION)
            _keep_wide(model, new)
        if getattr(model, "hf_quantizer", None) is None:
            model = model.to(device)
        return LoadedModel(keep_exact(model).eval(), tokenizer, new)


def _picture_reader(layout: Layout, model: Any) -> PictureReader | str | None:
    """How the model reads pictures, or why it cannot; None for a model of text alone."""
    if not hasattr(base_model(model), "get_image_features"):
        return None
    try:
        processor = layout.processor()
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        return f"the model's processor cannot be loaded: {_first_line(error)}"
    if processor is None:
        return "the model's files hold no processor (preprocessor_config.json)"
    reader = picture_reader(processor, model.dtype)
    if isinstance(reader, PictureReader):
        from lorakit.models.picture_positions import picture_positions

        reader.positions = picture_positions(base_model(model))
    return reader


@contextmanager
def _failures_named(name: str, task_type: str) -> Iterator[None]:
    """Makes one clear InputError of what transformers and the readers of files raise."""
    try:
        yield
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"model: {name} holds a pickle with more in it than tensors, or a damaged one: it is "
            "not read; fetch the model's safetensors"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, StructError) as error:
        if "Unrecognized configuration class" in str(error) and task_type != "CAUSAL_LM":
            raise InputError(
                f"model: {name} has no form for lora.task_type {task_type} (transformers has no "
                f"{FORMS[task_type]} of its architecture): give another model or task_type"
            ) from error
        raise InputError(f"model: {name} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"model: {name} holds a damaged file: {_first_line(error)}") from error


def _load_causal(layout: Layout, name: str, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    config = None if layout.packing else layout.config()
    if config is not None and is_encoder(config):
        raise InputError(
            f"model: {name} is an encoder ({config.model_type}), which writes no text: give a "
            "causal language model, or train it with lora.task_type SEQ_CLS or TOKEN_CLS and use "
            "it by lorakit eval or PEFT (lorakit serve gives its embeddings, and labels and scores)"
        )
    form = FORMS["CAUSAL_LM"] if config is None else causal_form(config)
    model, info = from_files(layout, form, dtype=dtype, **options)
    if info["missing_keys"]:  # which are random now
        raise InputError(
            f"model: {name} lacks {listed(sorted(info['missing_keys']), 3)} in its files: copy or "
            "fetch the model again"
        )
    if left := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"model: {name} holds tensors that {type(model).__name__} has no place for, which are "
            f"left out: {listed(left, 3)}",
            stacklevel=4,
        )
    if dtype.itemsize == 8 and expert_parameters(model):  # the grouped product takes no float64
        model.set_experts_implementation("eager")
    return model


def _load_form(
    layout: Layout,
    task_type: str,
    dtype: torch.dtype,
    labels: Sequence[str],
    seed: int,
    loading: Mapping[str, Any],
) -> tuple[Any, set[str]]:
    """The model, and the names of the parameters that its files lack or have in another shape."""
    import torch
    from transformers.utils import logging

    options = {**label_options(labels), **loading}
    if labels:
        options["ignore_mismatched_sizes"] = True  # a head for other labels gives way to a new one
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is new is returned
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = from_files(layout, FORMS[task_type], dtype=dtype, **options)
    finally:
        logging.set_verbosity(before)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return model, {*info["missing_keys"], *mismatched}


def set_padding(model: Any, pad_token_id: int) -> None:
    """Sets the token by which a causal model finds the end of a row, which its classifier reads."""
    model.config.pad_token_id = pad_token_id
    model.config.get_text_config().pad_token_id = pad_token_id


def _new_modules(model: Any, lacking: set[str], heads: bool) -> list[str]:
    """Paths of a classifier's head (all beside the body that has parameters), and of new modules.

    A model's files may lack more than the head: a BERT without its pooler, say. Left out of the
    adapter, it would be random again whenever the adapter is loaded.
    """
    found = [
        name
        for name, child in model.named_children()
        if heads and child is not model.base_model and any(True for _ in child.parameters())
    ]
    for key in sorted(lacking):
        path = key.rpartition(".")[0]
        if not any(path == name or path.startswith(f"{name}.") for name in found):
            found.append(path)
    return found


def _keep_wide(model: Any, paths: Sequence[str]) -> None:
    """Gives the modules at `paths` at least float32, as adapters have; their input follows."""
    import torch

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs
        )

    for path in paths:
        module = model.get_submodule(path)
        if all(p.element_size() < 4 for p in module.parameters()):
            module.float().register_forward_pre_hook(widen)


def most_tokens(model: Any, wanted: int) -> int:
    """`wanted`, or the length of the longest row that `model` has positions for."""
    return min(wanted, positions_of(model) or wanted)


def positions_of(model: Any) -> int | None:
    """The length of the longest row that `model` has positions for; None where it has no such.

    Rotary positions that a factor spreads (linear and dynamic scaling) reach that much further.
    """
    import torch

    base = base_model(model)
    config = base.config.get_text_config()
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from behind the padding token's number.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    own = getattr(config, "max_position_embeddings", None)
    if not isinstance(own, int) or own <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") in ("linear", "dynamic") else None
    return int(own * factor) if isinstance(factor, (int, float)) and factor > 1 else own


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of the weights as the model's files hold them; float32 when they do not say."""
    return resolve(str(name)).layout.stored_dtype()


def best_device() -> str:
    """`cuda`, `mps` or `cpu`, the first that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str, *, training: bool = False) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    Apple's GPUs (mps) and other accelerators are tried: bfloat16, then float16, which is not for
    training, as its gradients underflow without loss scaling.
    """
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(has for name, has in capabilities.items() if name.endswith("bf16"))
    else:
        native = computes(torch.bfloat16, device)
        if not (native or training) and computes(torch.float16, device):
            return torch.float16
    return torch.bfloat16 if native else torch.float32


@cache
def computes(dtype: torch.dtype, device: str) -> bool:
    """Whether a small product in `dtype` on `device` has the right value and a gradient."""
    import torch

    try:
        x = torch.full((8, 8), 1.5, dtype=dtype, device=device, requires_grad=True)
        product = x @ x
        product.sum().backward()
        values = (product.detach().cpu().float(), x.grad.cpu().float())  # type: ignore[union-attr]
        # 8 · 1.5² = 18 and 2 · 8 · 1.5 = 24, which every format holds exactly.
        return all(bool((v == wanted).all()) for v, wanted in zip(values, (18, 24), strict=True))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        return False


def torch_dtype(
    dtype: str | torch.dtype | None, device: str, *, training: bool = False
) -> torch.dtype:
    """The dtype that a recipe's or a user's word means on `device`; `training` as `best_dtype`."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return best_dtype(device, training=training)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return getattr(torch, dtype)


def _first_line(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "its files and its configuration have other shapes"
    if isinstance(error, StructError):
        return "its file ends too early"
    if "backend tokenizer" in str(error):
        return "its tokenizer's files are missing or damaged"
    return first_line(error)
