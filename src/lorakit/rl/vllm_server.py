"""vLLM as a program beside the run: its command line, and the requests that are made to it.

vLLM itself is never imported. Options and routes are those of its 0.26 to 0.32: adapters come by
`/v1/load_lora_adapter`, completions of token ids by `/v1/completions` with `return_token_ids`.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lorakit.adapters.export.vllm import RANKS
from lorakit.adapters.export.vllm_base import find_base, require_lora
from lorakit.errors import InputError, LorakitError, one_line

BASE_NAME = "base"


@dataclass(frozen=True)
class VllmServerOptions:
    """How vLLM is started.

    Args:
        model: the base model, as in a recipe.
        rank: the adapter's.
        dtype: of the base model, as in a recipe; None leaves it to vLLM.
        max_model_length: the most tokens of a prompt with its completion; None is the model's.
        gpu_memory_utilization: vLLM's, of each GPU; None is vLLM's default.
        tensor_parallel_size: how many GPUs the model is divided over.
        timeout: seconds that it may take until it answers.
    """

    model: str
    rank: int
    dtype: str | None = None
    max_model_length: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    timeout: float = 600.0


@dataclass(frozen=True)
class VllmServerCommand:
    """The command, and the variables that it needs."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """For a shell."""
        given = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*given, shlex.join(self.command)])


def command(options: VllmServerOptions, port: int) -> VllmServerCommand:
    """The command that serves the base, with room for an adapter that changes.

    Raises:
        InputError: vLLM cannot serve adapters on the model, or of that rank.
    """
    base = find_base(options.model)
    require_lora(base)
    rank = next((rank for rank in RANKS if rank >= options.rank), None)
    if rank is None:
        raise InputError(f"vLLM takes adapters up to rank {RANKS[-1]}, not {options.rank}")
    line = ["vllm", "serve", base.argument, f"--served-model-name={BASE_NAME}"]
    # Two at a time: the next step's comes before the last one goes.
    line += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
    line += ["--max-lora-rank", str(rank)]
    # Log-probabilities of logits / temperature, which are those that completions are drawn by.
    line += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if options.dtype is not None:
        line += ["--dtype", options.dtype]
    if options.max_model_length is not None:
        line += ["--max-model-len", str(options.max_model_length)]
    if options.gpu_memory_utilization is not None:
        line += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.tensor_parallel_size != 1:
        line += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    line += ["--host", "127.0.0.1", "--port", str(port)]
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return VllmServerCommand(tuple(line), variables)


def require_vllm() -> None:
    """Raises InputError where vLLM is not installed."""
    if shutil.which("vllm") is None:
        raise InputError(
            "rollouts: vllm needs a program vllm on the PATH: pip install vllm, or give "
            "objective.vllm_server_base_url of one that runs"
        )


class VllmServer:
    """A server of vLLM that is asked over HTTP.

    Args:
        url: of one that is running.
        timeout: seconds that one request may take.
    """

    def __init__(self, url: str, timeout: float = 600.0, key: str | None = None) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout
        self._key = os.environ.get("VLLM_API_KEY") if key is None else key
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @classmethod
    def started(cls, options: VllmServerOptions, log: Path) -> VllmServer:
        """Starts one on a free port, and waits until it answers.

        Args:
            log: the file for what it prints.

        Raises:
            InputError: vLLM is not installed, or cannot serve the model.
            LorakitError: it ended, or did not answer in time.
        """
        require_vllm()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        planned = command(options, port)
        key = secrets.token_hex(16)
        server = cls(f"http://127.0.0.1:{port}", options.timeout, key)
        server._log = log.open("wb")
        try:
            server._process = subprocess.Popen(
                planned.command,
                stdin=subprocess.DEVNULL,
                stdout=server._log,
                stderr=subprocess.STDOUT,
                env=os.environ | planned.environment | {"VLLM_API_KEY": key},
                start_new_session=True,
            )
            server._wait(log)
        except BaseException:
            server.close()
            raise
        return server

    def _wait(self, log: Path) -> None:
        assert self._process is not None
        until = time.monotonic() + self._timeout
        while self._process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            if time.monotonic() > until:
                raise LorakitError(f"vLLM did not answer within {self._timeout:g} s: see {log}")
            time.sleep(0.5)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = one_line(lines[-1][:300]) if lines else "it said nothing"
        raise LorakitError(f"vLLM ended with status {self._process.returncode}: {last} ({log})")

    def load(self, name: str, folder: Path) -> None:
        """Loads an adapter under a name that it has not had.

        A name that is given again would be served from what vLLM has cached of prompts under it.
        """
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        """Lets an adapter go."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def base_name(self) -> str:
        """What the base model is called there."""
        return str(json.loads(self._asked("/v1/models"))["data"][0]["id"])

    def completion(self, name: str, tokens: list[int], **sampling: Any) -> Mapping[str, Any]:
        """The one choice of a completion of these tokens, as OpenAI's API has it.

        Raises:
            LorakitError: the server refuses it, or is gone.
        """
        asked = {
            "model": name,
            "prompt": tokens,
            "n": 1,
            "logprobs": 1,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **sampling,
        }
        choice: Mapping[str, Any] = json.loads(self._post("/v1/completions", asked))["choices"][0]
        if choice.get("token_ids") is None:
            raise LorakitError(
                "vLLM gives no token ids of completions: it must be version 0.10.2 or newer"
            )
        return choice

    def _post(self, route: str, body: Mapping[str, Any]) -> bytes:
        return self._asked(route, json.dumps(body).encode())

    def _asked(self, route: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + route, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise LorakitError(f"vLLM refuses {route} ({error.code}): {one_line(said)}") from error
        except OSError as error:
            raise LorakitError(f"vLLM at {self._url} does not answer: {error}") from error

    def close(self) -> None:
        """Ends the server, if it was started here."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
        if self._log is not None:
            self._log.close()
