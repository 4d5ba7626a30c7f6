"""What is sampled from: the base, saved weights, and weights that a session alone has."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.engine.engine import Engine
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError, LorakitError
from lorakit.models.names import resolve
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoints import Store
from lorakit.server.training.wire import SampledTokens, write_samples


@dataclass(eq=False)
class Sampler:
    """What a sampling session samples from.

    Attributes:
        adapter: its name in the engine's pool; None is the base.
        model_path: the checkpoint that it is of, if it is of one.
        ephemeral: the weights are the session's alone, and go with it.
    """

    sampler_id: str
    owner: str
    adapter: str | None
    model_path: str | None = None
    ephemeral: bool = False


class Samplers:
    """The samplers of an engine.

    Args:
        store: of saved weights.

    Attributes:
        base_path: the folder of the base model.
    """

    def __init__(self, engine: Engine, store: Store) -> None:
        self.engine, self._store = engine, store
        self._samplers: dict[str, Sampler] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="lorakit-samplers-"))
        self.base_path = str(resolve(engine.model_name).path)

    def close(self) -> None:
        """Removes what only sampling sessions had."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def require_base(self, name: str | None) -> None:
        """Whether `name` means the model that is served.

        Raises:
            InputError: it does not.
        """
        served = self.engine.model_name
        alike = {served.casefold(), self.base_path.casefold(), Path(served).name.casefold()}
        if name is not None and not {name.casefold(), name.casefold().split("/")[-1]} & alike:
            raise InputError(f"this server has {served}, not {name}")

    def new_folder(self) -> Path:
        """Where weights may be saved that a session alone has."""
        return self._folder / uuid.uuid4().hex

    async def add(self, sampler_id: str, owner: str, folder: Path) -> None:
        """A sampler of the weights in a `new_folder`."""
        await asyncio.to_thread(self.engine.pool.register, sampler_id, folder, owner=owner)
        self._samplers[sampler_id] = Sampler(sampler_id, owner, sampler_id, ephemeral=True)

    async def create(self, sampler_id: str, asked: m.CreateSampler, owner: str) -> None:
        """A sampler of the base or of saved weights, unless there is one of this name."""
        if sampler_id not in self._samplers:
            self.require_base(asked.base_model)
            path = asked.model_path
            adapter = None if path is None else await self._served(path, owner)
            self._samplers[sampler_id] = Sampler(sampler_id, owner, adapter, path)

    async def _served(self, path: str, owner: str) -> str:
        """The name in the pool of the checkpoint at `path`, which is added if it is not there."""
        checkpoint = self._store.find(path, owner)
        try:
            self.engine.pool.version(path)
        except InputError:
            folder = self._store.folder(checkpoint)
            whose = "" if checkpoint.public else self._store.run(checkpoint.run_id, None).owner
            await asyncio.to_thread(self.engine.pool.register, path, folder, owner=whose)
        return path

    def find(self, sampler_id: str, owner: str) -> Sampler:
        """A sampler of this owner's.

        Raises:
            InputError: there is none.
        """
        found = self._samplers.get(sampler_id)
        if found is None or found.owner != owner:
            raise InputError(f"there is no sampling session {sampler_id!r}")
        return found

    def forget(self, sampler_id: str) -> None:
        """Removes a sampler, and the weights that it alone has."""
        sampler = self._samplers.pop(sampler_id, None)
        if sampler is not None and sampler.ephemeral:
            with suppress(InputError):
                folder = self.engine.pool.version(sampler_id).info.folder
                self.engine.pool.unregister(sampler_id)
                shutil.rmtree(folder, ignore_errors=True)

    async def sample(self, asked: m.Sample, owner: str) -> bytes:
        """Samples sequences, and takes the prompt's log-probabilities if they are asked for."""
        adapter = None
        if asked.sampling_session_id is not None:
            adapter = self.find(asked.sampling_session_id, owner).adapter
        elif asked.model_path is not None:
            adapter = await self._served(asked.model_path, owner)
        else:
            self.require_base(asked.base_model)
        prompt = asked.prompt.tokens
        scored = None
        if asked.prompt_logprobs or asked.topk_prompt_logprobs:
            scored = self.engine.score_prompt(prompt, adapter, asked.topk_prompt_logprobs)
        settings = self._sampling(asked)
        tickets: list[Ticket] = []
        try:
            for number in range(asked.num_samples):
                seed = None if settings.seed is None else settings.seed + number
                submit = self.engine.submit
                one = replace(settings, seed=seed)
                tickets.append(await asyncio.to_thread(submit, prompt, adapter, one))
            sequences = [await _sampled(ticket, asked.topk_sample_logprobs) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
        if scored is None:
            return write_samples(sequences)
        logprobs, top = await asyncio.wrap_future(scored)
        shown = asked.prompt_logprobs_last_n
        if shown is not None:
            logprobs = [float("nan")] * (len(logprobs) - shown) + logprobs[-shown:]
        wanted = asked.topk_prompt_logprobs
        return write_samples(sequences, logprobs, top if wanted else None, wanted)

    def _sampling(self, asked: m.Sample) -> Sampling:
        params = asked.sampling_params
        stop = params.stop
        texts: tuple[str, ...] = ()
        ends: frozenset[int] | None = None
        if isinstance(stop, str):
            texts = (stop,)
        elif stop is not None:
            texts = tuple(one for one in stop if isinstance(one, str))
            ends = None if texts else frozenset(one for one in stop if isinstance(one, int))
        return Sampling(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(0, params.top_k),
            max_new_tokens=params.max_tokens or self.engine.context_length,
            seed=None if params.seed is None else params.seed % 2**62,
            stop=texts,
            logprobs=asked.topk_sample_logprobs,
            end_tokens=ends,
            scaled_logprobs=True,
        )


async def _sampled(ticket: Ticket, top: int) -> SampledTokens:
    tokens: list[int] = []
    logprobs: list[float] = []
    rivals: list[list[tuple[int, float]]] = []
    reason = ""
    async for piece in ticket.pieces():
        if piece.error:
            raise LorakitError(piece.error)
        tokens += [one.token for one in piece.logprobs]
        logprobs += [one.logprob for one in piece.logprobs]
        rivals += [[(r.token, r.logprob) for r in one.top] for one in piece.logprobs]
        reason = piece.finish_reason or ""
    if reason == "cancelled":
        raise LorakitError("the engine has stopped")
    return SampledTokens(tokens, logprobs, reason == "stop", rivals if top else None)
