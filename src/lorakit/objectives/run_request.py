"""What a run asks of its objective, and the base model that is loaded for it.

The base is loaded with what the adapter says from which the run starts, and with new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorakit.data.template_clock import Rendering
from lorakit.errors import InputError, listed
from lorakit.models.load import load_for_task

if TYPE_CHECKING:
    import torch

    from lorakit.adapters.lineage import Start
    from lorakit.data.mixing import Sources
    from lorakit.data.too_long import TooLong
    from lorakit.models.load import LoadedModel
    from lorakit.models.quantization.settings import Quantization


@dataclass(frozen=True)
class RunRequest:
    """The base model and the rows that a run asks for.

    Args:
        model, dtype, device, quantization: as in `load_model`.
        seed: of weights that the model's files lack.
        train, eval, max_length, columns, limit, too_long: as in `data.dataset.prepare`.
        data_seed: of the rows that are held out or drawn by a weight, and of a stream's order.
        buffer_size: read rows as they come, and shuffle them within so many; None reads all.
        rendering: how conversations become text; by default as the tokenizer has it, now.
        answer: the answers of a model to the prompts of samples, for objectives that sample some:
            called with model, tokenizer, samples, the most new tokens, and a seed.
        start: the adapter that the run starts from, whose tokens and chat templates are taken over.
        tokens: whose rows of embedding and head are trained; those that are new are added.
        media_dir: where pictures are looked for; None is the folder of the data.
        fetch_images: whether pictures of the web are fetched, or the hosts that alone are asked.
    """

    model: str
    dtype: str | torch.dtype | None
    train: Sources
    eval: float | Sources = 0.1
    device: str | None = None
    quantization: Quantization | None = None
    seed: int = 42
    max_length: int = 1024
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    too_long: TooLong = "cut"
    data_seed: int = 42
    buffer_size: int | None = None
    rendering: Rendering = field(default_factory=Rendering)
    answer: Callable[..., list[str]] | None = None
    start: Start | None = None
    tokens: tuple[str, ...] = ()
    media_dir: str | None = None
    fetch_images: bool | Sequence[str] = False

    def load(self, task_type: str, labels: Sequence[str] = ()) -> LoadedBase:
        """The base model in its form for `task_type`, with what the start says of it.

        Args:
            labels: the names of a classifier's classes.

        Raises:
            InputError: it cannot be loaded.
        """
        from lorakit.adapters.open import fit_base
        from lorakit.models.fingerprint import fingerprint
        from lorakit.models.new_tokens import add_tokens

        loaded = load_for_task(
            task_type,
            self.model,
            self.dtype,
            device=self.device,
            labels=labels,
            seed=self.seed,
            quantization=self.quantization,
        )
        model: Any = loaded.model
        tokenizer: Any = loaded.tokenizer
        notices: list[str] = []
        base_fingerprint = fingerprint(model, without=loaded.new_modules)
        if self.start is not None:
            tokenizer, _, notice = fit_base(model, tokenizer, self.start.files)
            notices += [notice] if notice and task_type == "CAUSAL_LM" else []
        own = tokenizer is not loaded.tokenizer
        rows: dict[str, list[int]] = {}
        if self.tokens:
            continues = self.start is not None and self.start.record.mode == "continue"
            if continues and (new := set(self.tokens) - tokenizer.get_vocab().keys()):
                raise InputError(
                    f"tokens: {listed(sorted(new))} cannot be added to an adapter that is "
                    "continued: train a new one on top of it (adapter.mode=freeze)"
                )
            found = add_tokens(model, tokenizer, self.tokens)
            own, rows = own or bool(found.added), rows if continues else found.rows
            notices += [f"new tokens: {listed(found.added)}"] if found.added else []
        return LoadedBase(
            replace(loaded, tokenizer=tokenizer), base_fingerprint, notices, own, rows
        )


@dataclass(frozen=True)
class LoadedBase:
    """A base model that was loaded for a run.

    Args:
        fingerprint: of its files' weights.
        own_tokenizer: the tokenizer has more tokens than the base's.
        token_rows: tokens whose rows are trained, by the path of embedding or head.
    """

    loaded: LoadedModel
    fingerprint: str | None
    notices: list[str]
    own_tokenizer: bool
    token_rows: dict[str, list[int]]
