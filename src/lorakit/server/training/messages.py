"""The JSON bodies of the training routes, with the names and defaults of the Tinker SDK 0.38.

A field that is not known is refused by its name, unless it has no value: the SDK sends null for
what it leaves out.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Seconds = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
Rank = Annotated[int, Field(ge=1, le=1024)]
_METADATA_BYTES = 16_384


def _short(metadata: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(metadata)) > _METADATA_BYTES:
        raise ValueError(f"metadata may have {_METADATA_BYTES:,} bytes as JSON")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_short)]
Labels = Annotated[dict[str, str], AfterValidator(_short)]


class Message(BaseModel):
    """A JSON object; `type` is the SDK's own mark."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {k: v for k, v in data.items() if k in known or v is not None}


class Lora(Message):
    """The adapter of a model. alpha is 32, whatever the rank."""

    rank: Rank = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Message):
    """Which optimizer a model has."""

    type: Literal["adamw"] = "adamw"


class CreateSession(Message):
    """The first request of a client."""

    tags: list[str] = []
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: Annotated[str, Field(max_length=1000)] | None = None


class OfSession(Message):
    """A request that names its session."""

    session_id: str


class CreateModel(OfSession):
    """A new adapter to be trained."""

    model_seq_id: int
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: Lora = Lora()
    optimizer_config: OptimizerConfig = OptimizerConfig()


class OfModel(Message):
    """A request that names its model."""

    model_id: str


class Step(OfModel):
    """A request that has its place in a model's sequence."""

    seq_id: int


class Adam(Message):
    """One step of AdamW; `grad_clip_norm` 0 clips nothing."""

    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class OptimStep(Step):
    """Applies the gradients."""

    adam_params: Adam


class SaveWeights(Step):
    """Saves the weights and the optimizer's state."""

    path: Name | None = None
    ttl_seconds: Seconds | None = None
    overwrite: bool = False
    user_metadata: Labels | None = None


class SaveForSampler(Step):
    """Saves the weights to be sampled from, under a name or for a sampling session alone."""

    path: Name | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Seconds | None = None
    overwrite: Literal[False] = False
    user_metadata: Labels | None = None


class SaveExternal(Step):
    """Saves the weights to be downloaded."""

    path: Name
    ttl_seconds: Seconds | None = None
    overwrite: Literal[False] = False
    user_metadata: Labels | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=32)] | None = None


class LoadWeights(Message):
    """Saved weights into a model, or into a new one."""

    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None


class CreateSampler(OfSession):
    """Something to sample from: the base, or saved weights."""

    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class TextChunk(Message):
    """Tokens of a prompt."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[int]


class Prompt(Message):
    """A prompt in chunks."""

    chunks: list[TextChunk]

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, data: Any) -> Any:
        chunks = data.get("chunks") if isinstance(data, dict) else None
        for chunk in chunks if isinstance(chunks, list) else ():
            kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else "encoded_text"
            if kind != "encoded_text":
                raise ValueError(f"a chunk of type {kind!r} is not taken: prompts are text here")
        return data

    @property
    def tokens(self) -> list[int]:
        """All its tokens."""
        return [token for chunk in self.chunks for token in chunk.tokens]


class SamplingParams(Message):
    """How tokens are chosen; `stop` None is the end of text, an empty list is nothing."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Sample(Message):
    """A request to sample."""

    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: Prompt
    sampling_params: SamplingParams
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=128)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=128)] = 0
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=0)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: Literal[False] | None = None


class Retrieve(Message):
    """Asks for a result."""

    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(Message):
    """One client of a sampling session: the requests of clone n begin at n * 1e9."""

    sampling_session_id: str
    cloned_sampler_id: int = 0


class RetrieveEnded(Message):
    """Asks which requests have ended since the one with number `prev_cursor`."""

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    retrieved_request_ids: list[str] = []


class JoinSampler(Message):
    """Asks for a number for one more client of a sampling session."""

    sampling_session_id: str


class WeightsInfo(Message):
    """Asks what saved weights are."""

    tinker_path: str


class Ttl(Message):
    """When a checkpoint is deleted; None is never."""

    ttl_seconds: Seconds | None = None
