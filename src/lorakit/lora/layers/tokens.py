"""Single rows of an embedding that are trained: `trainable_token_indices`.

New tokens are taught without a copy of the whole embedding; modules that are tied to it, a head or
the embeddings of an encoder and a decoder, follow it. A head that is not has rows of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.layers.weight_updates import in_part
from lorakit.lora.layers.wrapped import WrappedModule, unwrapped
from lorakit.lora.routing import Routing


class TokenRows(nn.Module):
    """The rows of each adapter, under PEFT's names.

    `trainable_tokens_delta[name]` (tokens, dim) holds the rows themselves, not differences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}


class TrainedTokens(WrappedModule):
    """An embedding, and for each adapter the rows of some tokens in place of the base's."""

    nesting = 2
    by_name = ("token_indices", "trainable_tokens_delta")

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        self.base_weight.requires_grad_(False)
        self.token_adapter = TokenRows()
        self._tied: list[nn.Module] = []  # in a list, so that it is no submodule here

    def tie(self, module: nn.Module) -> "TiedModule":
        """A module with this embedding's weight, wrapped to follow it; merging keeps them tied."""
        self._tied.append(own := unwrapped(module))
        return (TiedEmbedding if isinstance(own, nn.Embedding) else TiedHead)(module, self)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As every layer's, for the tied modules too."""
        super().merge(*args, **kwargs)
        for module in self._tied:
            module.weight = self.base_weight

    def unmerge(self) -> None:
        """As every layer's, for the tied modules too."""
        super().unmerge()
        for module in self._tied:
            module.weight = self.base_weight

    @property
    def trainable_tokens_delta(self) -> nn.ParameterDict:
        """The rows (tokens, dim) of each adapter."""
        return self.token_adapter.trainable_tokens_delta

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """The tokens whose rows each adapter has."""
        return self.token_adapter.token_indices

    def add_adapter(self, name: str, tokens: list[int], autocast: bool = True) -> None:
        """Starts adapter `name`'s rows from the base's own.

        Args:
            autocast: the rows are float32 where the base is float16 or bfloat16, which would lose
                small steps.

        Raises:
            InputError: a number is no token of this embedding, or occurs twice.
        """
        size = self.base_weight.shape[0]
        wrong = [t for t in tokens if not 0 <= t < size]
        if wrong or len(set(tokens)) != len(tokens):
            raise InputError(
                f"trainable_token_indices must be different numbers below {size}, not {tokens}"
            )
        self.token_indices[name] = list(tokens)
        rows = self._unmerged("weight").detach()[tokens].clone()
        half = autocast and rows.dtype in (torch.float16, torch.bfloat16)
        self.trainable_tokens_delta[name] = nn.Parameter(rows.float() if half else rows)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.token_indices:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta[name]}

    def changed_parameters(self, names: Sequence[str]) -> list[str]:
        self._require_apart(names)
        return ["weight"]

    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        weight = self._unmerged(parameter).detach().clone()
        for name in names:
            weight[self.token_indices[name]] = self.rows(name).to(weight)
        return weight

    def rows(self, name: str) -> torch.Tensor:
        """What adapter `name` has in the place of the base's rows, (tokens, dim)."""
        V, share = self.trainable_tokens_delta[name], self.shares.get(name, 1.0)
        if share == 1:
            return V
        W = self._unmerged(self.weight_name).detach()[self.token_indices[name]]
        return in_part(W.to(V), V, share)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's embeddings of `x` (batch, n), with trained rows where there are some."""
        return self.replaced(x, self.base_layer(x, *args, **kwargs), self.base_layer)

    def replaced(self, x: torch.Tensor, y: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """What `embedding` made of tokens `x`, `y` (batch, n, dim), with trained rows in it."""
        if not (names := self.serving()):
            return y
        rows, slots = self._slots(names, x)
        slot = slots[x] if slots.dim() == 1 else slots.gather(1, x.flatten(1)).view_as(x)
        scale = getattr(embedding, "embed_scale", None)
        rows = rows if scale is None else rows * torch.as_tensor(scale).to(rows)
        return torch.where(slot[..., None] >= 0, rows.to(y.dtype)[slot.clamp(min=0)], y)

    def logits(self, x: torch.Tensor, y: torch.Tensor, head: nn.Module) -> torch.Tensor:
        """Logits of `head` for `x` (batch, n, dim), `y`, with those of trained tokens in them."""
        if not (names := self.serving()):
            return y
        rows, slots = self._slots(names, x)
        new = F.linear(x, rows.to(x.dtype))
        if (bias := getattr(head, "bias", None)) is not None:
            tokens = [t for name in names for t in self.token_indices[name]]
            new = new + bias[tokens]
        if slots.dim() == 2:
            slots = slots.view(slots.shape[0], *[1] * (y.dim() - 2), slots.shape[1]).expand_as(y)
        else:
            slots = slots.expand_as(y)
        return torch.where(slots >= 0, new.gather(-1, slots.clamp(min=0)), y)

    def serving(self) -> list[str]:
        """The adapters on the route that have rows here and are not merged.

        Raises:
            InputError: two of them train the same token for the same row.
        """
        route = self.routing.route
        if route.rows is None:
            names = [] if self.merged else self.active_adapters
            self._require_apart(names)
            return names
        if self.merged:
            raise InputError(
                "adapter_names cannot be used while an adapter is merged: unmerge first"
            )
        return [name for name in route.row_names if name in self.token_indices]

    def require_together(self, names: Sequence[str]) -> None:
        """Raises InputError when two of these adapters train the same token."""
        self._require_apart([name for name in names if name in self.token_indices])

    def _require_apart(self, names: Sequence[str]) -> None:
        tokens = [token for name in names for token in self.token_indices[name]]
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{listed(names)} train some of the same tokens: use one at a time")

    def _slots(self, names: list[str], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of `names`, and for every token the number of its row, -1 for none.

        Returns: rows (n, dim), and slots (vocabulary,), or (batch, vocabulary) where rows of the
        batch have adapters of their own.
        """
        rows = torch.cat([self.rows(name) for name in names])
        route, size = self.routing.route, self.base_weight.shape[0]
        tables = torch.full((len(names) + 1, size), -1, device=x.device)
        first = 0
        for i, name in enumerate(names):
            tokens = torch.tensor(self.token_indices[name], device=x.device)
            tables[i, tokens] = torch.arange(first, first + len(tokens), device=x.device)
            first += len(tokens)
        if route.rows is None:
            return rows, tables.max(dim=0).values
        return rows, tables[route.row_index(x, names)]


class TrainedHead(TrainedTokens):
    """A head with a weight of its own, in which the rows of some tokens are trained."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of `x` (batch, n, dim); those of trained tokens come from the trained rows."""
        return self.logits(x, self.base_layer(x, *args, **kwargs), self.get_base_layer())


class TiedModule(WrappedModule):
    """A module whose weight is a `TrainedTokens` embedding's, and that follows its rows.

    It has nothing of its own: the rows, and what is to be checked and merged, are the embedding's.
    """

    nesting = TrainedTokens.nesting
    embedding: TrainedTokens

    def __init__(self, base_layer: nn.Module, embedding: TrainedTokens) -> None:
        super().__init__(base_layer, embedding.routing)
        vars(self)["embedding"] = embedding  # not as a submodule

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that the embedding has."""
        return self.embedding.adapters

    @property
    def token_adapter(self) -> TokenRows:
        """The embedding's rows, which are this module's too."""
        return self.embedding.token_adapter


class TiedEmbedding(TiedModule):
    """Another embedding with the same weight, as encoders and decoders have one each."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's embeddings of `x` (batch, n), with trained rows where there are some."""
        y = self.base_layer(x, *args, **kwargs)
        return self.embedding.replaced(x, y, self.base_layer)


class TiedHead(TiedModule):
    """A head with the embedding's weight: trained rows give these logits too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of `x` (batch, n, dim); those of trained tokens come from the trained rows."""
        return self.embedding.logits(x, self.base_layer(x), self.base_layer)
