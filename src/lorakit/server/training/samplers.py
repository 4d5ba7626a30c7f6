"""What is sampled from: the base, saved weights, a model as it is now, and weights of a session.

Weights that only a session has are files below the state folder. A key has some tens of them; of
more than that, or than its disk has room for, those go that have been used least recently.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from lorakit.engine.engine import Engine
from lorakit.engine.prompt_scores import PromptScores
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError, LorakitError
from lorakit.models.names import resolve
from lorakit.server.keys import Caller
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoints import Store
from lorakit.server.training.quotas import Quotas
from lorakit.server.training.tenants import LiveRun
from lorakit.server.training.wire import SampledTokens, write_samples

_SNAPSHOTS = 64
"""How many snapshots a key has that only sampling sessions refer to."""
_SERVED = 512
"""How many checkpoints are known to the engine by name; others are read again when used."""


@dataclass(eq=False)
class Sampler:
    """What a sampling session samples from.

    Attributes:
        adapter: its name in the engine's pool; None is the base.
        model_path: the checkpoint that it is of, if it is of one.
        clients: numbers for further clients of the session; the first is 0.
    """

    sampler_id: str
    owner: str
    adapter: str | None
    model_path: str | None = None
    clients: count[int] = field(default_factory=lambda: count(1))


@dataclass(frozen=True)
class _Weights:
    """Files that only samplers refer to."""

    owner: str
    folder: Path
    size: int
    run_id: str
    changes: int = -1  # of the run when they were taken


class Samplers:
    """The samplers of an engine.

    Args:
        store: of saved weights.
        folder: for the weights that sampling sessions have.

    Attributes:
        base_path: the folder of the base model.
    """

    def __init__(self, engine: Engine, store: Store, quotas: Quotas, folder: Path) -> None:
        self.engine, self._store, self._quotas = engine, store, quotas
        self._samplers: dict[str, Sampler] = {}
        self._snapshots: OrderedDict[str, _Weights] = OrderedDict()  # by the name in the pool
        self._live: dict[str, _Weights] = {}  # likewise
        self._served: OrderedDict[str, None] = OrderedDict()
        self._folder, self._publishing = folder, asyncio.Lock()
        shutil.rmtree(folder, ignore_errors=True)  # of a server that was killed
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

    # --- weights that only sessions have ---------------------------------------------------

    async def add(self, sampler_id: str, run: LiveRun, folder: Path) -> None:
        """A sampler of a run's weights in a `new_folder`.

        The run's older ones leave the memory; whoever samples from them has them read again.
        """
        owner, weights = run.record.owner, await self._registered(sampler_id, run, folder)
        for name, older in self._snapshots.items():
            if older.run_id == weights.run_id:
                self.engine.pool.let_go(name)
        self._snapshots[sampler_id] = weights
        self._samplers[sampler_id] = Sampler(sampler_id, owner, sampler_id)
        own = [name for name, weights in self._snapshots.items() if weights.owner == owner]
        for name in own[:-_SNAPSHOTS]:
            self._drop(name, self._snapshots.pop(name))

    def follow(self, sampler_id: str, run: LiveRun) -> None:
        """A sampler of what has been published of a run, now and later."""
        owner = run.record.owner
        self._samplers[sampler_id] = Sampler(sampler_id, owner, live_name(run.record.run_id))

    async def publish(self, run: LiveRun, folder: Path, changes: int) -> None:
        """Has everyone who samples from a live run sample from the weights in a `new_folder`."""
        name = live_name(run.record.run_id)
        async with self._publishing:  # what the engine has last is what is kept
            weights = await self._registered(name, run, folder)
            if (old := self._live.get(name)) is not None:
                self._remove_files(old)
            self._live[name] = replace(weights, changes=changes)

    def is_older(self, run: LiveRun) -> bool:
        """Whether a run's weights have changed since it was published."""
        weights = self._live.get(live_name(run.record.run_id))
        return weights is None or weights.changes < run.changes

    def forget_live(self, run_id: str) -> None:
        """Nobody samples from a run any more as it was published."""
        name = live_name(run_id)
        if (weights := self._live.pop(name, None)) is not None:
            self._drop(name, weights)

    async def _registered(self, name: str, run: LiveRun, folder: Path) -> _Weights:
        owner, size = run.record.owner, sum(file.stat().st_size for file in folder.iterdir())
        weights = _Weights(owner, folder, size, run.record.run_id)
        try:
            while not self._quotas.disk.has_room(owner, size):
                own = [n for n, w in self._snapshots.items() if w.owner == owner]
                if not own:
                    break
                self._drop(own[0], self._snapshots.pop(own[0]))
            self._quotas.disk.take(owner, size)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            await asyncio.to_thread(self.engine.pool.register, name, folder, owner=owner)
        except BaseException:
            self._remove_files(weights)
            raise
        return weights

    def _drop(self, name: str, weights: _Weights) -> None:
        with suppress(InputError):
            self.engine.pool.unregister(name)
        self._remove_files(weights)

    def _remove_files(self, weights: _Weights) -> None:
        self._quotas.disk.take(weights.owner, -weights.size)
        shutil.rmtree(weights.folder, ignore_errors=True)

    # --- samplers --------------------------------------------------------------------------

    async def create(self, sampler_id: str, asked: m.CreateSampler, caller: Caller) -> None:
        """A sampler of the base or of saved weights, unless there is one of this name."""
        if sampler_id not in self._samplers:
            self.require_base(asked.base_model)
            path = asked.model_path
            adapter = None if path is None else await self.serve(path, caller)
            self._samplers[sampler_id] = Sampler(sampler_id, caller.owner, adapter, path)

    async def serve(self, path: str, caller: Caller) -> str:
        """The name in the pool of the checkpoint at `path`, which is added if it is not there."""
        checkpoint = self._store.find(path, caller)
        self._served[path] = None
        self._served.move_to_end(path)
        try:
            self.engine.pool.version(path)
        except InputError:
            folder = self._store.folder(checkpoint)
            whose = "" if checkpoint.public else self._store.run(checkpoint.run_id).owner
            await asyncio.to_thread(self.engine.pool.register, path, folder, owner=whose)
        while len(self._served) > _SERVED:
            with suppress(InputError):
                self.engine.pool.unregister(self._served.popitem(last=False)[0])
        return path

    def find(self, sampler_id: str, caller: Caller) -> Sampler:
        """A sampler of this caller's.

        Raises:
            InputError: there is none.
        """
        found = self._samplers.get(sampler_id)
        if found is None or not caller.sees(found.owner):
            raise InputError(f"there is no sampling session {sampler_id!r}")
        return found

    def forget(self, sampler_id: str) -> None:
        """Removes a sampler, and the weights that it alone has."""
        self._samplers.pop(sampler_id, None)
        if (weights := self._snapshots.pop(sampler_id, None)) is not None:
            self._drop(sampler_id, weights)

    # --- sampling --------------------------------------------------------------------------

    def cost(self, asked: m.Sample) -> int:
        """The most tokens that a request reads and writes."""
        prompt, context = len(asked.prompt.tokens), self.engine.context_length
        most = min(asked.sampling_params.max_tokens or context, max(0, context - prompt))
        return prompt + asked.num_samples * most

    async def sample(self, asked: m.Sample, caller: Caller) -> bytes:
        """Samples sequences, and takes the prompt's log-probabilities if they are asked for."""
        cost = self.cost(asked)
        self._quotas.require_request(cost)
        with self._quotas.under_way(caller.owner, cost):
            return await self._sample(asked, await self._adapter(asked, caller), caller.owner)

    async def _adapter(self, asked: m.Sample, caller: Caller) -> str | None:
        if asked.sampling_session_id is not None:
            sampler_id = asked.sampling_session_id
            sampler = self.find(sampler_id, caller)
            if sampler.model_path is not None:
                return await self.serve(sampler.model_path, caller)
            if sampler.adapter == sampler_id and sampler_id not in self._snapshots:
                raise InputError(
                    f"the weights of {sampler_id} are gone: a key has at most {_SNAPSHOTS} "
                    "snapshots without a name, and no more than its disk quota has room for; save "
                    "with a name to keep them"
                )
            if sampler_id in self._snapshots:
                self._snapshots.move_to_end(sampler_id)
            return sampler.adapter
        if asked.model_path is not None:
            return await self.serve(asked.model_path, caller)
        self.require_base(asked.base_model)
        return None

    async def _sample(self, asked: m.Sample, adapter: str | None, owner: str) -> bytes:
        prompt, settings = asked.prompt.tokens, self._sampling(asked)
        tickets: list[Ticket] = []
        scored = None
        if asked.prompt_logprobs or asked.topk_prompt_logprobs:
            if adapter is not None and not self.engine.pool.holds(adapter):
                await asyncio.to_thread(self.engine.pool.loaded, self.engine.pool.version(adapter))
            if asked.num_samples == settings.max_new_tokens == 1:  # the pass over the prompt has it
                tickets.append(Ticket(tuple(prompt), adapter, settings))
            rivals = asked.topk_prompt_logprobs
            answer = next(iter(tickets), None)
            scored = self.engine.score_prompt(prompt, adapter, rivals, owner, answer)

        def submit(one: Sampling) -> Ticket:
            return self.engine.submit(prompt, adapter, one, owner=owner)

        try:
            for number in range(len(tickets), asked.num_samples):
                seed = None if settings.seed is None else settings.seed + number
                one = replace(settings, seed=seed)
                at_once = adapter is None or self.engine.pool.holds(adapter)
                tickets.append(submit(one) if at_once else await asyncio.to_thread(submit, one))
            scores: PromptScores | None = None
            if scored is not None:
                scores = await asyncio.wrap_future(scored)
            sequences = [await _sampled(ticket, asked.topk_sample_logprobs) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
        self._quotas.sampled[owner] += sum(len(one.tokens) for one in sequences)
        if scores is None:
            return write_samples(sequences)
        logprobs, top, shown = scores.logprobs, scores.rivals, asked.prompt_logprobs_last_n
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


def live_name(run_id: str) -> str:
    """What a run is called as it was last published."""
    return f"tinker://{run_id}"


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
