"""Rows as a Tinker client sends them, and what plain torch and PEFT make of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM


def datum(tokens: Sequence[int], targets: Sequence[int] | None = None, **inputs: Any) -> Any:
    """A row in which position i predicts target i; without targets, the next token."""
    if targets is None:
        tokens, targets = tokens[:-1], tokens[1:]
    tensors = {"target_tokens": tensor([*targets], "int64")}
    tensors |= {name: tensor([*values], "float32") for name, values in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints([*tokens]), loss_fn_inputs=tensors)


def tensor(values: list[Any], dtype: Any) -> Any:
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def logprobs(result: Any) -> list[torch.Tensor]:
    """Of each row of a result."""
    return [torch.as_tensor(out["logprobs"].data) for out in result.loss_fn_outputs]


def with_peft(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def plain_logprobs(model: Any, tokens: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
    """The log-probabilities (N,) of targets behind tokens."""
    logs = model(input_ids=torch.tensor([[*tokens]])).logits[0].log_softmax(-1)
    return logs.gather(1, torch.tensor(targets)[:, None])[:, 0]


def vanish(client: Any) -> None:
    """Ends a client as a kill does, without a word to the server; nothing comes from it later."""
    holder = client._session_holder
    holder.run_coroutine_threadsafe(holder.aclose()).result(timeout=30)


@contextmanager
def lost_client(url: str, key: str, **options: Any) -> Iterator[Any]:
    """A client whose session or server may end before it, which `close` would ask for minutes."""
    client = tinker.ServiceClient(base_url=url, api_key=key, **options)
    try:
        yield client
    finally:
        if client._session_holder is not None:
            client._session_holder.close()
