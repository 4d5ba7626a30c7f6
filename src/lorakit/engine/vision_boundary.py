"""Where the part of a model that sees pictures ends, and its projector begins.

What stands before the boundary is recorded for a picture, and put in place of its computation
later. Where the projector stands behind the vision part, that is the vision part's outputs; where
it stands inside, as Qwen's merger, the projector's inputs, and the blocks before it are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import ModelOutput

from lorakit.lora.parts import part_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Recorded = tuple[Any, ...]
"""What passed the boundary for some pictures, in the order of the calls."""


class VisionBoundary:
    """The boundary of a model.

    Attributes:
        exists: whether the model has one vision part, and there is something to skip in it.
        inside: whether the projector stands inside the vision part.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        prefixes = part_prefixes(model)
        vision = prefixes["vision"]
        self._tower: Any = model.get_submodule(vision[0]) if len(vision) == 1 else None
        own = [p for p in prefixes["projector"] if vision and p.startswith(f"{vision[0]}.")]
        self._projectors = [one for path in own for one in _called(model.get_submodule(path))]
        self.inside = bool(self._projectors)
        self._blocks: Sequence[nn.Module] = ()
        if self._tower is not None and self.inside:
            within = {id(m) for one in self._projectors for m in one.modules()}
            lists = [
                m
                for m in self._tower.modules()
                if isinstance(m, nn.ModuleList) and not any(id(one) in within for one in m)
            ]
            self._blocks = [*max(lists, key=len, default=[])]
        self.exists = self._tower is not None and (not self.inside or bool(self._blocks))
        self._layers = _read_layers(model.config)

    def before(self) -> Iterator[nn.Module]:
        """The modules in front of the boundary."""
        behind = {id(m) for one in self._projectors for m in one.modules()}
        return (m for m in self._tower.modules() if id(m) not in behind)

    @contextmanager
    def recording(self) -> Iterator[list[Any]]:
        """Within the block, what passes the boundary is added to the list."""
        found: list[Any] = []

        def output(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            made = compute(*args, **kwargs)
            found.append(self._slim(_new(made)))
            return made

        def given(compute: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
            found.append(x.detach())
            return compute(x, *args, **kwargs)

        with ExitStack() as until:
            for module in self._projectors if self.inside else [self._tower]:
                until.enter_context(_instead(module, given if self.inside else output))
            yield found

    @contextmanager
    def replaying(self, recorded: Recorded) -> Iterator[None]:
        """Within the block, what was recorded passes the boundary and nothing before is computed.

        Pictures must be asked for in the same order as they were.
        """
        left = iter(recorded)

        def output(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _new(next(left))

        def given(compute: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
            return compute(next(left), *args, **kwargs)

        def skipped(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        with ExitStack() as until:
            for module in self._projectors if self.inside else [self._tower]:
                until.enter_context(_instead(module, given if self.inside else output))
            for block in self._blocks:
                until.enter_context(_instead(block, skipped))
            yield

    def _slim(self, made: Any) -> Any:
        """An output without the hidden states of layers that the model does not read."""
        states = getattr(made, "hidden_states", None)
        if states is None or self._layers is None:
            return made
        read = {layer % len(states) for layer in self._layers}
        return replace(
            made, hidden_states=tuple(x if i in read else None for i, x in enumerate(states))
        )


def _called(module: nn.Module) -> list[nn.Module]:
    """The module, or those of a list of modules, which is never called itself."""
    return [*module] if isinstance(module, nn.ModuleList) else [module]


def _read_layers(config: Any) -> list[int] | None:
    found = getattr(config, "vision_feature_layer", None)
    return [found] if isinstance(found, int) else found


def _new(made: Any) -> Any:
    """A new output around the same tensors, as models write into what they get."""
    return replace(made) if isinstance(made, ModelOutput) else made


@contextmanager
def _instead(module: Any, compute: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `compute` is called for `module`, with its own forward before all else."""
    own = module.forward
    replaced = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: compute(own, *args, **kwargs)
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced
