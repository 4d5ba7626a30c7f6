"""The protobuf messages of the training protocol, as the `tinker` SDK 0.38 writes and reads them.

Their fields and numbers are those of its public package `tinker_public`. Requests become rows of
plain tokens and numbers here, and results become bytes; nothing else knows of protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lorakit.errors import InputError

CONTENT_TYPE = "application/x-protobuf"

# Message: its fields, "number name type", with * for a repeated one and <> for a map from strings.
_MESSAGES: Mapping[str, str] = {
    "TopkLogprobs": "1 token_ids bytes; 2 logprobs bytes; 3 k uint32; 4 length uint32",
    "SparseCsr": "1 values bytes; 2 crow_indices bytes; 3 col_indices bytes",
    "Tensor": "1 dense bytes; 2 sparse_csr SparseCsr; 3 dtype int32; 4 shape int64*",
    "SampledSequence": (
        "1 stop_reason int32; 2 tokens bytes; 3 logprobs bytes; "
        "4 topk_sampled_logprobs TopkLogprobs"
    ),
    "SampleResponse": (
        "1 sequences SampledSequence*; 2 prompt_logprobs bytes; "
        "3 topk_prompt_logprobs TopkLogprobs; 4 prompt_cache_hit_tokens int32"
    ),
    "BatchedTensor": "1 data bytes; 2 offsets bytes; 3 dtype int32; 4 trailing_shape int64*",
    "ArrayRecord": "1 type_tag string; 2 fields <BatchedTensor>; 3 num_datums int64",
    "ForwardBackwardOutput": (
        "1 loss_fn_output_type string; 2 loss_fn_outputs ArrayRecord*; 3 metrics <double>"
    ),
    "EncodedTextChunk": "1 tokens bytes",
    "OtherChunk": "",
    "Chunk": "1 encoded_text EncodedTextChunk; 2 image OtherChunk; 3 dmel OtherChunk",
    # Where tokens come from (model_input_spans) changes nothing in the losses that there are.
    "Datum": "1 model_input Chunk*; 2 loss_fn_inputs <Tensor>",
    "LossConfigValue": "1 number double; 2 text string",
    "ForwardBackwardRequest": (
        "1 model_id string; 2 seq_id int32; 3 data Datum*; 4 loss_fn string; "
        "5 loss_fn_config <double>; 6 forward_only bool; 7 loss_fn_config_v2 <LossConfigValue>"
    ),
}
_TYPES = {
    "double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13,
}  # fmt: skip
_MESSAGE, _OPTIONAL, _REPEATED = 11, 1, 3
_PACKAGE = "lorakit.training"

_DTYPES = {1: "<f4", 2: "<i8", 3: "<i4"}
_BFLOAT16 = 4
_FLOAT32, _INT64 = 1, 2
_WIDEST = 1024  # targets of a token
_MOST_CELLS = 2**24  # of a request's sparse tensors: a few bytes may stand for very many
EMPTY_LOGPROB = -99999.0
"""The log-probability in a cell that holds no token."""


@dataclass(frozen=True)
class Datum:
    """A row as it was sent.

    Attributes:
        tokens: what the model reads.
        inputs: by name, float32 or int64 arrays whose first dimension is the tokens'.
    """

    tokens: list[int]
    inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class PassRequest:
    """A request to compute a loss, and its gradients unless `forward_only`."""

    model_id: str
    seq_id: int
    data: list[Datum]
    loss: str
    settings: dict[str, float | str]
    forward_only: bool


@dataclass(frozen=True)
class SampledTokens:
    """One sampled sequence; `top` has (token, log-probability) pairs for each of its tokens."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    top: list[list[tuple[int, float]]] | None = None


def head_of(body: bytes) -> tuple[str, int, int]:
    """The model's id, the place in its sequence, and the tokens, of a request to compute.

    Raises:
        InputError: the bytes are no such message.
    """
    message = _parsed("ForwardBackwardRequest", body)
    chunks = (chunk for datum in message.data for chunk in datum.model_input)
    return message.model_id, message.seq_id, sum(len(c.encoded_text.tokens) // 4 for c in chunks)


def read_pass(body: bytes) -> PassRequest:
    """A request to compute.

    Raises:
        InputError: the bytes are no such message, or hold what is not text.
    """
    message = _parsed("ForwardBackwardRequest", body)
    settings: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        settings[name] = value.text if value.text else value.number
    sparse = [
        math.prod(tensor.shape)
        for datum in message.data
        for tensor in datum.loss_fn_inputs.values()
        if tensor.HasField("sparse_csr")
    ]
    if sum(sparse) > _MOST_CELLS:
        raise InputError(
            f"the sparse tensors have {sum(sparse)} cells, and {_MOST_CELLS} are taken of a "
            "request: send fewer rows at a time"
        )
    return PassRequest(
        message.model_id,
        message.seq_id,
        [_datum(each, at) for at, each in enumerate(message.data)],
        message.loss_fn,
        settings,
        message.forward_only,
    )


def write_pass(logprobs: Sequence[np.ndarray], metrics: Mapping[str, float]) -> bytes:
    """The result of a pass: the log-probabilities of each row, (N,) or (N, K), and sums."""
    message = _class("ForwardBackwardOutput")(loss_fn_output_type="ArrayRecord")
    for name, value in metrics.items():
        message.metrics[name] = value
    begin = 0
    while begin < len(logprobs):  # rows of one trailing shape make one record
        shape, end = logprobs[begin].shape[1:], begin
        while end < len(logprobs) and logprobs[end].shape[1:] == shape:
            end += 1
        arrays = [np.ascontiguousarray(each, dtype="<f4") for each in logprobs[begin:end]]
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=end - begin)
        field = record.fields["logprobs"]
        field.data = b"".join(each.tobytes() for each in arrays)
        field.offsets = np.cumsum([0, *(each.nbytes for each in arrays)], dtype="<i8").tobytes()
        field.dtype = _FLOAT32
        field.trailing_shape.extend(shape)
        begin = end
    written: bytes = message.SerializeToString()
    return written


def write_samples(
    sequences: Sequence[SampledTokens],
    prompt_logprobs: Sequence[float] | None = None,
    prompt_top: Sequence[Sequence[tuple[int, float]]] | None = None,
    top: int = 0,
) -> bytes:
    """The result of sampling.

    Args:
        prompt_logprobs: of each of the prompt's tokens, NaN for the first.
        prompt_top: the likeliest tokens in the place of each of them.
        top: how many of these there are to be, at most.
    """
    message = _class("SampleResponse")()
    for one in sequences:
        written = message.sequences.add(
            stop_reason=0 if one.stopped else 1,
            tokens=np.array(one.tokens, dtype="<i4").tobytes(),
            logprobs=np.array(one.logprobs, dtype="<f4").tobytes(),
        )
        if one.top is not None:
            _write_top(written.topk_sampled_logprobs, one.top)
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.array(prompt_logprobs, dtype="<f4").tobytes()
    if prompt_top is not None:
        _write_top(message.topk_prompt_logprobs, prompt_top, top)
    serialized: bytes = message.SerializeToString()
    return serialized


def _write_top(field: Any, rows: Sequence[Sequence[tuple[int, float]]], width: int = 0) -> None:
    width = max(width, *map(len, rows)) if rows else width
    cells = [[*row, *[(0, EMPTY_LOGPROB)] * (width - len(row))] for row in rows]
    field.token_ids = np.array([[t for t, _ in row] for row in cells], dtype="<i4").tobytes()
    field.logprobs = np.array([[p for _, p in row] for row in cells], dtype="<f4").tobytes()
    field.k, field.length = width, len(rows)


def _datum(message: Any, at: int) -> Datum:
    tokens: list[int] = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise InputError(f"datum {at}: model_input has a chunk that is not text")
        raw = chunk.encoded_text.tokens
        if len(raw) % 4:
            raise InputError(f"datum {at}: a text chunk is not made of int32 tokens")
        tokens += np.frombuffer(raw, dtype="<i4").tolist()
    inputs = {
        name: _array(tensor, f"datum {at}: {name}", len(tokens))
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum(tokens, inputs)


def _array(tensor: Any, what: str, tokens: int) -> np.ndarray:
    """A tensor, dense, as float32 or int64: (tokens,) or (tokens, K)."""
    shape = tuple(tensor.shape)
    wide = len(shape) == 2 and not 1 <= shape[1] <= _WIDEST
    if len(shape) not in (1, 2) or shape[0] != tokens or wide:
        raise InputError(
            f"{what} has shape {list(shape)}: ({tokens},) or ({tokens}, K), K up to {_WIDEST}, "
            f"fit a model_input of {tokens} tokens"
        )
    try:
        if tensor.HasField("sparse_csr"):
            csr = tensor.sparse_csr
            rows, _columns = shape
            dense = np.zeros(shape, dtype=_numbers(b"", tensor.dtype).dtype)
            starts = np.frombuffer(csr.crow_indices, dtype="<i8")
            at = np.frombuffer(csr.col_indices, dtype="<i8")
            values = _numbers(csr.values, tensor.dtype)
            counts = np.diff(starts)
            fits = len(starts) == rows + 1 and counts.sum() == len(at) == len(values)
            if not fits or (counts < 0).any() or (at < 0).any():
                raise ValueError("its indices do not fit its shape")
            dense[np.repeat(np.arange(rows), counts), at] = values
            return dense
        return _numbers(tensor.dense, tensor.dtype).reshape(shape)
    except (ValueError, IndexError, MemoryError) as error:
        raise InputError(f"{what} is not a tensor of shape {list(shape)}: {error}") from error


def _numbers(raw: bytes, dtype: int) -> np.ndarray:
    if dtype == _BFLOAT16:
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _DTYPES:
        raise ValueError(f"its dtype {dtype} is not known")
    found = np.frombuffer(raw, dtype=_DTYPES[dtype])
    return found.astype(np.float32 if dtype == _FLOAT32 else np.int64, copy=False)


def _parsed(name: str, body: bytes) -> Any:
    from google.protobuf.message import DecodeError

    message = _class(name)()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InputError(f"the body is not a protobuf {name}") from error
    return message


def _class(name: str) -> Any:
    return _classes()[name]


@cache
def _classes() -> dict[str, Any]:
    """Protobuf's class of each message."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="lorakit/training.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for each in filter(None, fields.split("; ")):
            number, field, kind = each.split()
            if kind.startswith("<"):
                entry = _entry_name(field)
                pair = message.nested_type.add(name=entry)
                pair.options.map_entry = True
                _field(pair, 1, "key", "string")
                _field(pair, 2, "value", kind[1:-1])
                _field(message, int(number), field, f"{name}.{entry}*")
            else:
                _field(message, int(number), field, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


def _field(message: Any, number: int, name: str, kind: str) -> None:
    label = _REPEATED if kind.endswith("*") else _OPTIONAL
    kind = kind.removesuffix("*")
    if kind in _TYPES:
        message.field.add(name=name, number=number, label=label, type=_TYPES[kind])
    else:
        of = f".{_PACKAGE}.{kind}"
        message.field.add(name=name, number=number, label=label, type=_MESSAGE, type_name=of)


def _entry_name(field: str) -> str:
    """The name that protobuf gives to the entries of a map."""
    return "".join(part.capitalize() for part in field.split("_")) + "Entry"
