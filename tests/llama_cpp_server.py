"""llama.cpp itself, as the wheels of `xllamacpp` bring it: its server, and its quantisers."""

import ctypes
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")


class LlamaCpp:
    """A running server with one model."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def _post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """The numbers of the tokens that it reads in `text`."""
        body = {"content": text, "parse_special": True, "add_special": add_special}
        return self._post("/tokenize", **body)["tokens"]

    def answer(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that it writes greedily after `ids`, ends of turns among them."""
        ids, begin = list(ids), len(ids)
        for _ in range(count):  # one at a time: it would end at the end of a turn
            step = self._next(ids, probabilities=1)
            ids += step["tokens"] or [step["completion_probabilities"][0]["id"]]
        return ids[begin:]

    def logprobs(self, ids: Sequence[int], vocabulary: int) -> np.ndarray:
        """The log-probability of each token after `ids` (vocabulary,)."""
        # It tells nothing of a token that ends a turn or is half a letter: `"` is written instead.
        answer = self._next(list(ids), vocabulary, logit_bias=[['"', 1000.0]])
        (step,) = answer["completion_probabilities"]
        found = np.full(vocabulary, np.nan)
        for token in step["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def _next(self, ids: list[int], probabilities: int, **options: Any) -> Any:
        return self._post(
            "/completion",
            prompt=ids,
            n_predict=1,
            samplers=["top_k"],
            top_k=1,
            n_probs=probabilities,
            return_tokens=True,
            cache_prompt=True,
            **options,
        )


@contextmanager
def running(model: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """A server with the GGUF file `model`, computing in float32 on one thread."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    yield LlamaCpp(server)
    del server


def its_quantized(values: np.ndarray, form: gguf.GGMLQuantizationType) -> np.ndarray:
    """The bytes that llama.cpp makes of `values` (rows, d_in) of float32."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    rows, width = values.shape
    found = np.zeros(gguf.quant_shape_to_byte_shape(values.shape, form), np.uint8)
    begin, rows, width = (ctypes.c_int64(number) for number in (0, rows, width))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (values, found))
    library.ggml_quantize_chunk(int(form), *pointers, begin, rows, width, None)
    return found
