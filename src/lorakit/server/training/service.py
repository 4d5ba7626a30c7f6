"""What the training routes do: tenants' requests become operations of the resident engine.

Everything here runs on the server's event loop; what computes is handed to the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.engine.adapter_memory import COPIES, AdapterMemory
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.engine import Engine
from lorakit.engine.policy_losses import policy_loss
from lorakit.engine.token_losses import AdapterRow
from lorakit.errors import InputError
from lorakit.folder_lock import locked_folder
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.server.errors import no_model
from lorakit.server.keys import Caller
from lorakit.server.options import TrainingLimits
from lorakit.server.training import messages as m
from lorakit.server.training.age_files import recipients_of
from lorakit.server.training.checkpoints import Checkpoint, Run, Store, now
from lorakit.server.training.history import History
from lorakit.server.training.lora_parts import LoraParts
from lorakit.server.training.quotas import Quotas
from lorakit.server.training.rows import rows_of
from lorakit.server.training.samplers import Samplers
from lorakit.server.training.saving import Saving
from lorakit.server.training.tenants import LiveRun, Session, Sessions
from lorakit.server.training.wire import PassRequest, write_pass
from lorakit.training.machine import return_freed_memory

_SESSION_SECONDS = 3600.0
_TIDY_SECONDS = 60.0
_BYTES = 4  # of a parameter: adapters are trained in float32
_LARGE = 16_384  # tokens whose rows are made in a thread

log = logging.getLogger("lorakit.training")
"""Who does what, without keys and without contents."""


class TrainingService:
    """The runs, samplers and checkpoints of one engine.

    Args:
        state: the folder that checkpoints are kept in; it is this process's while the service is.
        label: what is shown in the place of an owner's key.

    Attributes:
        quotas: what each owner has under way and on disk.
        memory: which adapters are in memory.
        sessions: of clients that are heard of.

    Raises:
        InputError: another process has the folder.
    """

    def __init__(
        self,
        engine: Engine,
        state: Path,
        limits: TrainingLimits,
        label: Callable[[str], str],
    ) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(locked_folder(state, lambda: None))
        self.engine, self.label, self.quotas = engine, label, Quotas(limits)
        self.store = Store(state, self.quotas.disk)
        idle = state / "idle"
        shutil.rmtree(idle, ignore_errors=True)  # of a server that was killed: nobody's any more
        self.memory = AdapterMemory(engine.resident, idle, limits.memory_bytes)
        engine.training.memory = self.memory
        self.sessions = Sessions()
        self._runs: dict[str, LiveRun] = {}
        self._beginning = Counter[str]()
        self._tidied = time.monotonic()
        self.samplers = Samplers(engine, self.store, self.quotas, state / "samplers")
        self._saving = Saving(engine, self.store)
        self._vocabulary = vocabulary_size(engine.resident.base)
        self._parts = LoraParts(engine.resident.base)

    def close(self) -> None:
        """Removes what only sessions had, and lets others have the folder."""
        self.samplers.close()
        shutil.rmtree(self.store.state / "idle", ignore_errors=True)
        self._stack.close()

    def drain(self) -> None:
        """Takes nothing more; what waits for requests that cannot come any more fails."""
        for run in self._runs.values():
            run.end_waiting("the server ends: load the last checkpoint when it is back")

    # --- sessions ---------------------------------------------------------------------------

    def finish_session(self, session_id: str, caller: Caller) -> None:
        """Forgets what a session had in memory, behind what is computed; checkpoints stay."""
        session = self.sessions.remove(session_id, caller)
        log.info("session %s ends", session_id)
        for sampler_id in session.samplers:
            self.samplers.forget(sampler_id)
        for run_id in session.runs:
            with suppress(InputError):  # it was unloaded before
                self._let_go(self.run(run_id, caller))

    def _let_go(self, run: LiveRun) -> Future[None]:
        """Takes a run out, and its adapter behind what waits for it."""
        run_id = run.record.run_id
        del self._runs[run_id]
        run.end_waiting("the model was unloaded")
        self.samplers.forget_live(run_id)

        def removed() -> None:
            try:
                self.memory.remove(run.adapter)
            except Exception as error:  # nobody waits for it
                log.warning("model %s cannot be removed: %s", run_id, error)

        return self.engine.training.call(run.adapter, removed, owner=run.record.owner)

    async def tidy(self) -> None:
        """Finishes sessions whose client has not been heard of for an hour, removes expired
        checkpoints, and gives freed memory back; at most once a minute, when a client is heard of.
        """
        if time.monotonic() - self._tidied < _TIDY_SECONDS:
            return
        self._tidied = time.monotonic()
        for session in self.sessions.silent(_SESSION_SECONDS):
            self.finish_session(session.session_id, Caller(session.owner))
        for checkpoint in await asyncio.to_thread(lambda: [*self.store.expired()]):
            await self.delete(checkpoint)
        await asyncio.to_thread(return_freed_memory)

    # --- runs -------------------------------------------------------------------------------

    def runs(self, caller: Caller) -> list[LiveRun]:
        """The runs in memory that a caller sees."""
        return [run for run in self._runs.values() if caller.sees(run.record.owner)]

    async def create_model(self, asked: m.CreateModel, caller: Caller) -> str:
        """A new run, with an adapter that changes nothing yet; its id.

        Raises:
            InputError: the session or the base is not there, or nothing is to be trained.
        """
        session = self.sessions.find(asked.session_id, caller)
        self.samplers.require_base(asked.base_model)
        lora = asked.lora_config
        config = self._parts.config(lora)
        self.quotas.require_adapter(_BYTES * COPIES * self._parts.parameters(lora))
        seed = lora.seed or 0  # two runs of one recipe are the same run
        record = Run(
            f"{session.session_id}:train:{asked.model_seq_id}",
            session.owner,
            self.engine.model_name,
            lora.model_dump(exclude={"type"}) | {"seed": seed},
            asked.user_metadata,
            created=now().isoformat(),
            last_request=now().isoformat(),
        )
        if record.run_id in self._runs:
            return record.run_id
        run = self._new(record)

        def create() -> None:
            self.engine.resident.create(run.adapter, config, seed)
            self.memory.added(run.adapter)

        await self._begin(run, session, create)
        return record.run_id

    def _new(self, record: Run) -> LiveRun:
        history = History(self.store.history(record.run_id))
        return LiveRun(record, f"run-{uuid.uuid4().hex}", history)

    async def _begin(self, run: LiveRun, session: Session, work: Callable[[], None]) -> None:
        """Has a run's adapter made by `work`, if its owner may have one more."""
        owner, run_id = run.record.owner, run.record.run_id
        live = sum(other.record.owner == owner for other in self._runs.values())
        self.quotas.require_model(live + self._beginning[owner])
        self._beginning[owner] += 1
        try:
            await self._call(run, work)
            await asyncio.to_thread(self.store.write_run, run.record)
        finally:
            self._beginning[owner] -= 1
        self._runs[run_id] = run
        session.runs.append(run_id)
        if session.ended:  # meanwhile
            self._let_go(run)
            raise InputError(f"session {session.session_id} has ended")
        rank = run.record.lora["rank"]
        log.info("model %s of %s begins, rank %d", run_id, self.label(owner), rank)

    def run(self, run_id: str, caller: Caller) -> LiveRun:
        """A run of this caller's that is live.

        Raises:
            InputError: there is none.
        """
        found = self._runs.get(run_id)
        if found is None or not caller.sees(found.record.owner):
            raise InputError(
                f"there is no model {run_id!r} in memory: create one, or load its weights"
            )
        with suppress(InputError):  # its client is there, also if it sends no heartbeats
            self.sessions.find(run_id.partition(":")[0], caller)
        return found

    def is_awaited(self, run_id: str, seq_id: int, caller: Caller) -> bool:
        """Whether requests of this run wait for this one of them."""
        run = self._runs.get(run_id)
        return run is not None and caller.sees(run.record.owner) and run.is_awaited(seq_id)

    async def unload(self, run_id: str, caller: Caller) -> None:
        """Forgets a run's adapter; its checkpoints stay."""
        await asyncio.wrap_future(self._let_go(self.run(run_id, caller)))

    def info(self, run_id: str, caller: Caller) -> dict[str, Any]:
        """What a run is, for `get_info`."""
        run = self.run(run_id, caller)
        return {
            "type": "get_info",
            "model_data": {
                "arch": type(self.engine.resident.base).__name__,
                "model_name": run.record.base_model,
                "tokenizer_id": self.samplers.base_path,
            },
            "model_id": run_id,
            "is_lora": True,
            "lora_rank": run.record.lora["rank"],
            "model_name": run.record.base_model,
        }

    def _call(self, run: LiveRun, work: Callable[[], Any]) -> asyncio.Future[Any]:
        owner = run.record.owner
        return asyncio.wrap_future(self.engine.training.call(run.adapter, work, owner=owner))

    # --- training ---------------------------------------------------------------------------

    async def forward_backward(self, asked: PassRequest, caller: Caller) -> bytes:
        """A pass over rows: their tokens' log-probabilities, and the summed loss.

        Raises:
            InputError: a row, the loss or a setting cannot be taken.
        """
        run = self.run(asked.model_id, caller)
        owner = run.record.owner
        tokens = sum(len(datum.tokens) for datum in asked.data)
        rows: list[AdapterRow] | InputError
        try:
            loss = policy_loss(asked.loss, asked.settings)
            large = tokens > _LARGE  # then others are answered meanwhile
            rows = (
                await asyncio.to_thread(self._rows, run, asked) if large else self._rows(run, asked)
            )
        except InputError as error:  # which comes in the place that the request has
            rows = error

        async def start() -> bytes:
            if isinstance(rows, InputError):
                raise rows
            found = await asyncio.wrap_future(
                self.engine.training.forward_backward(
                    run.adapter, rows, loss, learning=not asked.forward_only, owner=owner
                )
            )
            total = sum(found.losses)
            if not asked.forward_only:
                run.history.passed(asked.data, total)
                self.quotas.trained[owner] += tokens
            logprobs = [one.float().cpu().numpy() for one in found.logprobs]
            return write_pass(logprobs, {"loss:sum": total})

        return await run.in_order(asked.seq_id, start)

    def _rows(self, run: LiveRun, asked: PassRequest) -> list[AdapterRow]:
        return rows_of(run.adapter, asked, self._vocabulary, self.engine.context_length)

    async def optim_step(self, asked: m.OptimStep, caller: Caller) -> dict[str, Any]:
        """Applies and clears a run's gradients."""
        run = self.run(asked.model_id, caller)
        adam = asked.adam_params
        step = AdamW(
            adam.learning_rate,
            (adam.beta1, adam.beta2),
            adam.eps,
            adam.weight_decay,
            adam.grad_clip_norm,
        )

        resident = self.engine.resident

        found = await run.in_order(
            asked.seq_id, lambda: self._call(run, lambda: resident.optim_step(run.adapter, step))
        )
        run.changes += 1
        run.history.stepped(step.learning_rate, found["grad_norm"])
        return {"type": "optim_step", "metrics": {f"{k}:mean": v for k, v in found.items()}}

    # --- saving and loading -------------------------------------------------------------------

    async def save(self, asked: m.SaveWeights, caller: Caller) -> dict[str, Any]:
        """Saves weights and optimizer under a `tinker://` path."""
        run = self.run(asked.model_id, caller)
        name = asked.path or f"checkpoint-{asked.seq_id:06d}"
        path = await run.in_order(
            asked.seq_id,
            lambda: self._saving.checkpoint(run, "weights", name, asked),
            self._saving.turn(run),
        )
        return {"type": "save_weights", "path": path}

    async def save_external(self, asked: m.SaveExternal, caller: Caller) -> dict[str, Any]:
        """Saves the adapter to be downloaded, as a PEFT folder, encrypted if that is asked for."""
        run = self.run(asked.model_id, caller)

        async def start() -> str:
            recipients = recipients_of(asked.age_encryption_recipients or ())
            return await self._saving.checkpoint(
                run, "external_weights", asked.path, asked, recipients
            )

        path = await run.in_order(asked.seq_id, start, self._saving.turn(run))
        size = self.store.size(self.store.find(path, caller))
        return {"type": "save_weights_external", "path": path, "size_bytes": size}

    async def save_for_sampler(self, asked: m.SaveForSampler, caller: Caller) -> dict[str, Any]:
        """Saves weights to be sampled from: under a path, or for a new sampling session."""
        run = self.run(asked.model_id, caller)
        result: dict[str, Any] = {"type": "save_weights_for_sampler"}
        if asked.path is not None or asked.sampling_session_seq_id is None:
            name = asked.path or f"sampler-{asked.seq_id:06d}"
            path = await run.in_order(
                asked.seq_id,
                lambda: self._saving.checkpoint(run, "sampler_weights", name, asked),
                self._saving.turn(run),
            )
            return result | {"path": path}
        session_id = run.record.run_id.partition(":")[0]
        sampler_id = f"{session_id}:sample:{asked.sampling_session_seq_id}"
        folder = self.samplers.new_folder()
        changes = await run.in_order(
            asked.seq_id, lambda: self._saving.snapshot(run, folder), self._saving.turn(run)
        )
        if asked.kind == "inflight":
            await self.samplers.publish(run, folder, changes)
            self.samplers.follow(sampler_id, run)
        else:
            await self.samplers.add(sampler_id, run, folder)
        try:
            self.sessions.find(session_id, Caller(run.record.owner)).samplers.append(sampler_id)
        except InputError:  # it has ended meanwhile
            self.samplers.forget(sampler_id)
            raise
        return result | {"sampling_session_id": sampler_id}

    async def offer(self, model: str, caller: Caller) -> None:
        """Has the engine serve a checkpoint, or a live run as it is now, by its `tinker://` name.

        Raises:
            ApiError: 404, there is none that the caller sees.
        """
        if not model.startswith("tinker://"):
            return
        run_id = model.removeprefix("tinker://")
        try:
            if "/" in run_id:
                await self.samplers.serve(model, caller)
            elif self.samplers.is_older(run := self.run(run_id, caller)):
                folder = self.samplers.new_folder()
                async with self._saving.turn(run):
                    changes = await self._saving.snapshot(run, folder)
                await self.samplers.publish(run, folder, changes)
        except InputError as error:
            raise no_model(error) from error

    async def load(self, asked: m.LoadWeights, caller: Caller) -> dict[str, Any]:
        """Loads saved weights, into a new run or one that there is."""
        if asked.model_id is not None and asked.seq_id is not None:
            run = self.run(asked.model_id, caller)
            await run.in_order(asked.seq_id, lambda: self._load_again(run, asked, caller))
        elif asked.session_id is not None and asked.model_seq_id is not None:
            run = await self._load_new(asked, caller, asked.session_id, asked.model_seq_id)
        else:
            raise InputError("load_weights needs model_id and seq_id, or a session's two numbers")
        return {"type": "load_weights", "path": asked.path, "model_id": run.record.run_id}

    async def _load_again(self, run: LiveRun, asked: m.LoadWeights, caller: Caller) -> None:
        checkpoint, folder = self._saved(asked, caller)
        own, other = (
            {name: value for name, value in lora.items() if name != "seed"}
            for lora in (run.record.lora, self.store.run(checkpoint.run_id).lora)
        )
        if own != other:
            raise InputError(f"{asked.path} is of a model with {other}, and this one has {own}")
        resident, seed = self.engine.resident, int(run.record.lora["seed"])

        def load() -> None:
            resident.load(run.adapter, folder, seed, optimizer=asked.optimizer)

        await self._call(run, lambda: self.memory.replace(run.adapter, load))
        run.changes += 1

    async def _load_new(
        self, asked: m.LoadWeights, caller: Caller, session_id: str, number: int
    ) -> LiveRun:
        session = self.sessions.find(session_id, caller)
        self.samplers.require_base(asked.base_model)
        checkpoint, folder = self._saved(asked, caller)
        record = replace(
            self.store.run(checkpoint.run_id),
            run_id=f"{session.session_id}:train:{number}",
            owner=session.owner,
            user_metadata=asked.user_metadata,
            created=now().isoformat(),
            last_request=now().isoformat(),
        )
        if (there := self._runs.get(record.run_id)) is not None:
            return there
        run = self._new(record)
        seed, resident = int(record.lora["seed"]), self.engine.resident

        def load() -> None:
            resident.load(run.adapter, folder, seed, optimizer=asked.optimizer)
            self.memory.added(run.adapter)

        await self._begin(run, session, load)
        return run

    def _saved(self, asked: m.LoadWeights, caller: Caller) -> tuple[Checkpoint, Path]:
        checkpoint = self.store.find(asked.path, caller)
        if checkpoint.kind != "weights" and asked.optimizer:
            raise InputError(f"{asked.path} was saved for a sampler: it has no optimizer state")
        return checkpoint, self.store.folder(checkpoint)

    async def create_sampler(self, asked: m.CreateSampler, caller: Caller) -> str:
        """A sampling session over the base, or over saved weights; its id."""
        session = self.sessions.find(asked.session_id, caller)
        sampler_id = f"{session.session_id}:sample:{asked.sampling_session_seq_id}"
        await self.samplers.create(sampler_id, asked, caller)
        session.samplers.append(sampler_id)
        return sampler_id

    def set_public(self, checkpoint: Checkpoint, public: bool) -> None:
        """Publishes a checkpoint, or no longer."""
        self.store.change(checkpoint, public=public)
        with suppress(InputError):  # it is served again to whom it is for now
            self.engine.pool.unregister(checkpoint.path)

    async def delete(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint; what samples from it finishes."""
        with suppress(InputError):
            self.engine.pool.unregister(checkpoint.path)
        await asyncio.to_thread(self.store.delete, checkpoint)
        log.info("%s is deleted", checkpoint.path)
