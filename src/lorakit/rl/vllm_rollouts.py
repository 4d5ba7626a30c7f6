"""Completions by vLLM, which is handed each step's adapter; a source of rollouts.

Its numbers are not those of the trainer: the gap is measured as for the engine's own, and the loss
of each token is multiplied by the truncated ratio of both (`policy_gradient.truncated_ratio`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorakit.adapters.export.vllm import read_servable, write_copy
from lorakit.engine.sampling import ending
from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.progress import task
from lorakit.rl.vllm_server import VllmServer, VllmServerOptions, command, require_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Objective

_AT_ONCE = 64
"""Requests; vLLM makes batches of them itself."""
_SHOWN_PORT = 8000
"""In the command that is shown; a server that is started gets a free one."""


class VllmRollouts:
    """Samples by a server of vLLM, which it starts if none is named; a `RolloutSource`.

    Raises:
        InputError: vLLM cannot serve adapters of the model.
    """

    files: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        model: LoraModel | None = None,
    ) -> None:
        self._settings, self._tokenizer = objective.settings, tokenizer
        self._server: VllmServer | None = None
        self._folder = TemporaryDirectory(prefix="lorakit-vllm-")
        self._loads, self._loaded = 0, ""
        self._options: VllmServerOptions | None = None
        self._log: Path | None = None
        if model is None:
            raise InputError("rollouts vllm is for lorakit train: use rollouts engine here")
        if self._settings.vllm_server_base_url is None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise InputError(
                    "rollouts vllm: several processes share one server: start it with vllm serve "
                    "and give objective.vllm_server_base_url"
                )
            self._options = self._started_with(model)
            self._shown = command(self._options, _SHOWN_PORT).shown()

    @property
    def notices(self) -> Sequence[str]:
        """As in `RolloutSource`: the command that starts vLLM."""
        if self._options is None:
            return [f"completions are sampled by vLLM at {self._settings.vllm_server_base_url}"]
        return [f"completions are sampled by vLLM, started as: {self._shown}"]

    def require(self) -> None:
        """As in `RolloutSource`. Raises InputError where vLLM is not installed."""
        if self._options is not None:
            require_vllm()

    def write(
        self, asked: Sequence[AskedPrompt], model: LoraModel, step: int | None
    ) -> list[Rollout]:
        """As in `RolloutSource`. Raises InputError where vLLM cannot serve the adapter."""
        server = self._server = self._server or self._opened()
        name = self._hand_over(model, server)
        ends = ending(model.get_base_model(), self._tokenizer)
        stops = sorted(ends.tokens)

        def completed(one: AskedPrompt) -> Mapping[str, Any]:
            return server.completion(
                name,
                list(one.tokens),
                max_tokens=one.max_new_tokens,
                temperature=one.temperature,
                seed=one.seed,
                stop_token_ids=stops,
                stop=[ends.text] if ends.text else None,
            )

        choices: list[Mapping[str, Any]] = []
        with (
            task("sampling completions", len(asked)) as work,
            ThreadPoolExecutor(_AT_ONCE) as threads,
        ):
            for choice in threads.map(completed, asked):
                choices.append(choice)
                work.advance()
        return [self._rollout(choice, stops) for choice in choices]

    def _opened(self) -> VllmServer:
        settings = self._settings
        if self._options is None:
            return VllmServer(settings.vllm_server_base_url, settings.vllm_server_timeout)
        # Beside the folder that goes with the run, as who reads why vLLM failed needs it.
        log = Path(f"{self._folder.name}.log")
        server = VllmServer.started(self._options, log)
        self._log = log
        return server

    def _started_with(self, model: LoraModel) -> VllmServerOptions:
        settings, config = self._settings, _config(model)
        return VllmServerOptions(
            model=str(config.base_model_name_or_path),
            rank=max(config.r, *(config.rank_pattern or {"": 0}).values()),
            dtype=str(model.get_base_model().dtype).removeprefix("torch."),
            max_model_length=settings.vllm_max_model_length,
            gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
            tensor_parallel_size=settings.vllm_tensor_parallel_size,
            timeout=settings.vllm_server_timeout,
        )

    def _hand_over(self, model: LoraModel, server: VllmServer) -> str:
        """Has the server load the adapter as it is now; returns its name there."""
        if not model.active_adapters:
            return server.base_name()
        _config(model)
        adapter = model.active_adapter
        self._loads += 1
        name = f"policy-{os.environ.get('RANK', '0')}-{self._loads}"
        folder = Path(self._folder.name) / name
        model.save_pretrained(folder, selected_adapters=[adapter])
        if adapter != "default":
            folder /= adapter
        servable = read_servable(folder)
        if servable.needs_copy:
            folder = Path(self._folder.name) / f"{name}-vllm"
            write_copy(servable, folder)
        server.load(name, folder)
        if self._loaded:
            server.unload(self._loaded)
        self._loaded = name
        return name

    def _rollout(self, choice: Mapping[str, Any], stops: Sequence[int]) -> Rollout:
        tokens = [int(token) for token in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        ended = choice["finish_reason"] != "length"
        written = tokens[:-1] if ended and tokens and tokens[-1] in stops else tokens
        text = str(self._tokenizer.decode(written, skip_special_tokens=True))
        return Rollout(tokens, logprobs, "stop" if ended else "length", text)

    def close(self) -> None:
        """Ends the server, if it was started here."""
        if self._server is not None:
            self._server.close()
        if self._log is not None:
            self._log.unlink(missing_ok=True)
        self._folder.cleanup()


def _config(model: LoraModel) -> LoraConfig:
    """Of the adapter that is trained. Raises InputError where there is another below it."""
    if len(model.active_adapters) != 1:
        raise InputError(
            "rollouts vllm samples from the base with one adapter, and not from adapters on top of "
            "each other: use rollouts engine"
        )
    found: LoraConfig = model.peft_config[model.active_adapter]
    return found
