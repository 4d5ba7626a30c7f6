"""Optimisers that treat `A` and `B` apart: LoRA+ and LoRA-FA, over PyTorch's own optimisers."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lorakit.errors import InputError
from lorakit.lora.layers import LoraLayer
from lorakit.lora.wrapping import wrapped_modules


def loraplus_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for LoRA+ (Hayou et al. 2024, arXiv:2402.12354): `B` learns faster.

    Every trainable parameter is in one group: `A` and whatever else at `lr`, `B` at
    `loraplus_lr_ratio * lr`, embeddings' adapters at `loraplus_lr_embedding`; vectors (biases,
    DoRA's magnitudes) go with `B`, without weight decay.

    Raises:
        InputError: nothing in `model` is trainable.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if hasattr(module, "lora_embedding_A")
        for parameter in module.parameters(recurse=True)
    }
    found: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "vector": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            found["embedding"].append(parameter)
        elif parameter.dim() == 1 or ".lora_magnitude_vector." in name:
            found["vector"].append(parameter)
        else:
            found["B" if ".lora_B." in name else "A"].append(parameter)
    if not any(found.values()):
        raise InputError("nothing is trainable: load adapters with is_trainable=True to train them")
    fast = lr * loraplus_lr_ratio
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": fast, "vector": fast}
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": 0.0 if kind == "vector" else loraplus_weight_decay,
        }
        for kind, parameters in found.items()
    ]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser of the class given over `loraplus_groups`; `kwargs` are its own arguments."""
    groups = loraplus_groups(
        model, lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding
    )
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """AdamW for LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): `A` stays, only `B` is trained.

    Before every step the gradient of `B` becomes `grad (A Aᵀ)⁻¹ / scaling²`, which moves `B A` as
    close to the gradient of the full weight as a frozen `A` allows.

    Args:
        r, lora_alpha, use_rslora: as in PEFT's function; each layer's own are used.

    Raises:
        InputError: `use_rslora` is not what the adapters have, or nothing in `model` is trainable.
    """
    configs = getattr(model, "peft_config", {})
    for name in getattr(model, "active_adapters", ()):
        own = configs[name].use_rslora
        if use_rslora is not None and own != use_rslora:
            raise InputError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer, and '{name}' "
                f"has {own}"
            )
    pairs: list[tuple[torch.Tensor, nn.Parameter, float]] = []
    for _, layer in wrapped_modules(model):
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.adapters:
            tensors = layer.adapter_tensors(name)
            A, B = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
            if A is None or not isinstance(B, nn.Parameter) or not B.requires_grad:
                continue
            A.requires_grad_(False)
            pairs.append((A, B, layer.scaling[name]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("nothing is trainable: load adapters with is_trainable=True to train them")
    optimizer = AdamW(trained, lr=lr, weight_decay=weight_decay, eps=1e-6)

    @torch.no_grad()
    def project(*_: Any) -> None:
        for A, B, scaling in pairs:
            if B.grad is None:
                continue
            rows = A.flatten(1)
            gram = rows @ rows.T + 1e-8 * torch.eye(rows.shape[0]).to(rows)
            grad = B.grad.flatten(1)
            projected = torch.linalg.solve(gram, grad.T, left=True).T / scaling**2
            B.grad.copy_(projected.view_as(B.grad))

    optimizer.register_step_pre_hook(project)
    return optimizer
