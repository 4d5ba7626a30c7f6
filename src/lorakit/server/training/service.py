"""What the training routes do: tenants' requests become operations of the resident engine.

Everything here runs on the server's event loop; what computes is handed to the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.engine import Engine
from lorakit.engine.policy_losses import policy_loss
from lorakit.errors import InputError
from lorakit.lora.architecture import output_head
from lorakit.lora.config import LoraConfig
from lorakit.lora.targets import resolve_targets
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoints import Checkpoint, Run, Store, expiry, now
from lorakit.server.training.rows import rows_of
from lorakit.server.training.samplers import Samplers
from lorakit.server.training.tenants import LiveRun, Session
from lorakit.server.training.wire import PassRequest, write_pass

ALPHA = 32
"""LoRA's alpha, for all ranks: W + (alpha / r) B A ("LoRA Without Regret", Thinking Machines)."""

_SESSION_SECONDS = 3600.0
_TIDY_SECONDS = 60.0


class TrainingService:
    """The runs, samplers and checkpoints of one engine.

    Args:
        state: the folder that checkpoints are kept in.
    """

    def __init__(self, engine: Engine, state: Path) -> None:
        self.engine, self.store = engine, Store(state)
        self._sessions: dict[str, Session] = {}
        self._runs: dict[str, LiveRun] = {}
        self._numbers = count()
        self._tidied = time.monotonic()
        self.samplers = Samplers(engine, self.store)
        self._vocabulary = vocabulary_size(engine.resident.base)
        self._targets = _targets(engine.resident.base)

    def close(self) -> None:
        """Removes what only sampling sessions had."""
        self.samplers.close()

    # --- sessions ---------------------------------------------------------------------------

    def create_session(self, asked: m.CreateSession, owner: str) -> str:
        """A new session's id."""
        session = Session(
            str(uuid.uuid4()), owner, time.monotonic(), asked.user_metadata, asked.display_name
        )
        self._sessions[session.session_id] = session
        return session.session_id

    def session(self, session_id: str, owner: str) -> Session:
        """A session of this owner's, which is alive.

        Raises:
            InputError: there is none.
        """
        found = self._sessions.get(session_id)
        if found is None or found.owner != owner:
            raise InputError(f"there is no session {session_id!r}: create one")
        found.seen = time.monotonic()
        return found

    def sessions(self, owner: str) -> list[str]:
        """The ids of an owner's sessions."""
        return [s.session_id for s in self._sessions.values() if s.owner == owner]

    async def finish_session(self, session_id: str, owner: str) -> None:
        """Forgets what a session had in memory; checkpoints stay."""
        session = self.session(session_id, owner)
        del self._sessions[session_id]
        for sampler_id in session.samplers:
            self.samplers.forget(sampler_id)
        for run_id in session.runs:
            await self.unload(run_id, owner)

    async def tidy(self) -> None:
        """Finishes sessions whose client has not been heard of for an hour, and removes expired
        checkpoints; at most once a minute, whenever a client is heard of.
        """
        if time.monotonic() - self._tidied < _TIDY_SECONDS:
            return
        self._tidied = time.monotonic()
        late = time.monotonic() - _SESSION_SECONDS
        for session in [s for s in self._sessions.values() if s.seen < late]:
            await self.finish_session(session.session_id, session.owner)
        for checkpoint in [*self.store.expired()]:
            await self.delete(checkpoint)

    # --- runs -------------------------------------------------------------------------------

    async def create_model(self, asked: m.CreateModel, owner: str) -> str:
        """A new run, with an adapter that changes nothing yet; its id.

        Raises:
            InputError: the session or the base is not there, or nothing is to be trained.
        """
        session = self.session(asked.session_id, owner)
        self.samplers.require_base(asked.base_model)
        lora = asked.lora_config
        config = self._config(lora)
        seed = lora.seed or 0  # two runs of one recipe are the same run
        record = Run(
            f"{session.session_id}:train:{asked.model_seq_id}",
            owner,
            self.engine.model_name,
            lora.model_dump(exclude={"type"}) | {"seed": seed},
            asked.user_metadata,
            created=now().isoformat(),
            last_request=now().isoformat(),
        )
        if record.run_id in self._runs:
            return record.run_id
        run = LiveRun(record, f"run-{next(self._numbers)}")
        await self._call(run, lambda: self.engine.resident.create(run.adapter, config, seed))
        self._began(run, session)
        return record.run_id

    def _began(self, run: LiveRun, session: Session) -> None:
        self.store.write_run(run.record)
        self._runs[run.record.run_id] = run
        session.runs.append(run.record.run_id)

    def _config(self, lora: m.Lora) -> LoraConfig:
        wanted = {
            "attn": lora.train_attn,
            "mlp": lora.train_mlp,
            "unembed": lora.train_unembed,
        }
        targets = [name for part, names in self._targets.items() if wanted[part] for name in names]
        if not targets:
            raise InputError("nothing is trained: set train_attn, train_mlp or train_unembed")
        return LoraConfig(
            r=lora.rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
        )

    def run(self, run_id: str, owner: str) -> LiveRun:
        """A run of this owner's that is in memory.

        Raises:
            InputError: there is none.
        """
        found = self._runs.get(run_id)
        if found is None or found.record.owner != owner:
            raise InputError(
                f"there is no model {run_id!r} in memory: create one, or load its weights"
            )
        return found

    async def unload(self, run_id: str, owner: str) -> None:
        """Forgets a run's adapter; its checkpoints stay."""
        run = self.run(run_id, owner)
        del self._runs[run_id]
        await self._call(run, lambda: self.engine.resident.remove(run.adapter))

    def info(self, run_id: str, owner: str) -> dict[str, Any]:
        """What a run is, for `get_info`."""
        run = self.run(run_id, owner)
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
        return asyncio.wrap_future(self.engine.training.call(run.adapter, work))

    # --- training ---------------------------------------------------------------------------

    async def forward_backward(self, asked: PassRequest, owner: str) -> bytes:
        """A pass over rows: their tokens' log-probabilities, and the summed loss.

        Raises:
            InputError: a row, the loss or a setting cannot be taken.
        """
        run = self.run(asked.model_id, owner)

        async def start() -> bytes:
            loss = policy_loss(asked.loss, asked.settings)
            rows = rows_of(run.adapter, asked, self._vocabulary, self.engine.context_length)
            found = await asyncio.wrap_future(
                self.engine.training.forward_backward(
                    run.adapter, rows, loss, learning=not asked.forward_only
                )
            )
            logprobs = [one.float().cpu().numpy() for one in found.logprobs]
            return write_pass(logprobs, {"loss:sum": sum(found.losses)})

        return await run.in_order(asked.seq_id, start)

    async def optim_step(self, asked: m.OptimStep, owner: str) -> dict[str, Any]:
        """Applies and clears a run's gradients."""
        run = self.run(asked.model_id, owner)
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
        return {"type": "optim_step", "metrics": {f"{k}:mean": v for k, v in found.items()}}

    # --- saving and loading -------------------------------------------------------------------

    async def save(self, asked: m.SaveWeights, owner: str) -> dict[str, Any]:
        """Saves weights and optimizer under a `tinker://` path."""
        run = self.run(asked.model_id, owner)
        name = asked.path or f"checkpoint-{asked.seq_id:06d}"
        path = await run.in_order(
            asked.seq_id,
            lambda: self._save(run, "weights", name, asked, asked.overwrite),
        )
        return {"type": "save_weights", "path": path}

    async def save_for_sampler(self, asked: m.SaveForSampler, owner: str) -> dict[str, Any]:
        """Saves weights to be sampled from: under a path, or for a new sampling session."""
        run = self.run(asked.model_id, owner)
        result: dict[str, Any] = {"type": "save_weights_for_sampler"}
        if asked.path is not None or asked.sampling_session_seq_id is None:
            name = asked.path or f"sampler-{asked.seq_id:06d}"
            path = await run.in_order(
                asked.seq_id, lambda: self._save(run, "sampler_weights", name, asked, False)
            )
            return result | {"path": path}
        session_id = run.record.run_id.partition(":")[0]
        sampler_id = f"{session_id}:sample:{asked.sampling_session_seq_id}"
        folder = self.samplers.new_folder()

        async def start() -> None:
            if asked.kind == "inflight":
                raise InputError("kind inflight is not there: take snapshot, and save again later")
            await self._call(run, lambda: self.engine.resident.save(run.adapter, folder))

        await run.in_order(asked.seq_id, start)
        await self.samplers.add(sampler_id, owner, folder)
        if (session := self._sessions.get(session_id)) is not None:
            session.samplers.append(sampler_id)
        return result | {"sampling_session_id": sampler_id}

    async def _save(
        self,
        run: LiveRun,
        kind: str,
        name: str,
        asked: m.SaveWeights | m.SaveForSampler,
        overwrite: bool,
    ) -> str:
        checkpoint = Checkpoint(
            run.record.run_id,
            kind,
            name,
            now().isoformat(),
            expires=expiry(asked.ttl_seconds),
            user_metadata=asked.user_metadata,
        )

        def write(folder: Path) -> None:
            self.engine.resident.save(run.adapter, folder, optimizer=kind == "weights")

        await self._call(run, lambda: self.store.save(checkpoint, write, overwrite))
        run.record = replace(run.record, last_request=now().isoformat())
        self.store.write_run(run.record)
        return checkpoint.path

    async def load(self, asked: m.LoadWeights, owner: str) -> dict[str, Any]:
        """Loads saved weights, into a new run or one that there is."""
        if asked.model_id is not None and asked.seq_id is not None:
            run = self.run(asked.model_id, owner)
            await run.in_order(asked.seq_id, lambda: self._load_again(run, asked, owner))
        elif asked.session_id is not None and asked.model_seq_id is not None:
            run = await self._load_new(asked, owner, asked.session_id, asked.model_seq_id)
        else:
            raise InputError("load_weights needs model_id and seq_id, or a session's two numbers")
        return {"type": "load_weights", "path": asked.path, "model_id": run.record.run_id}

    async def _load_again(self, run: LiveRun, asked: m.LoadWeights, owner: str) -> None:
        _, folder = self._saved(asked, owner)
        resident = self.engine.resident

        def replaced() -> None:
            resident.remove(run.adapter)
            resident.load(run.adapter, folder, optimizer=asked.optimizer)

        await self._call(run, replaced)

    async def _load_new(
        self, asked: m.LoadWeights, owner: str, session_id: str, number: int
    ) -> LiveRun:
        session = self.session(session_id, owner)
        self.samplers.require_base(asked.base_model)
        checkpoint, folder = self._saved(asked, owner)
        record = replace(
            self.store.run(checkpoint.run_id, None),
            run_id=f"{session.session_id}:train:{number}",
            owner=owner,
            user_metadata=asked.user_metadata,
            created=now().isoformat(),
            last_request=now().isoformat(),
        )
        if (there := self._runs.get(record.run_id)) is not None:
            return there
        run = LiveRun(record, f"run-{next(self._numbers)}")
        seed, resident = int(record.lora["seed"]), self.engine.resident
        await self._call(
            run, lambda: resident.load(run.adapter, folder, seed, optimizer=asked.optimizer)
        )
        self._began(run, session)
        return run

    def _saved(self, asked: m.LoadWeights, owner: str) -> tuple[Checkpoint, Path]:
        checkpoint = self.store.find(asked.path, owner)
        if checkpoint.kind != "weights" and asked.optimizer:
            raise InputError(f"{asked.path} was saved for a sampler: it has no optimizer state")
        return checkpoint, self.store.folder(checkpoint)

    async def create_sampler(self, asked: m.CreateSampler, owner: str) -> str:
        """A sampling session over the base, or over saved weights; its id."""
        session = self.session(asked.session_id, owner)
        sampler_id = f"{session.session_id}:sample:{asked.sampling_session_seq_id}"
        await self.samplers.create(sampler_id, asked, owner)
        session.samplers.append(sampler_id)
        return sampler_id

    async def delete(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint; what samples from it finishes."""
        with suppress(InputError):
            self.engine.pool.unregister(checkpoint.path)
        await asyncio.to_thread(self.store.delete, checkpoint)


def _targets(base: Any) -> dict[str, list[str]]:
    """The linear layers of attention and of the rest of each layer, and the output layer."""
    every = resolve_targets(base, LoraConfig(target_modules="all-linear"))
    attention = resolve_targets(base, LoraConfig(target_modules="attention"))
    head = output_head(base)
    paths = [path for path, module in base.named_modules() if module is head]
    found = {
        "attn": attention,
        "mlp": [path for path in every if path not in set(attention)],
        "unembed": paths[:1],
    }
    paths = [path for names in found.values() for path in names]
    return {part: _short(names, paths) for part, names in found.items()}


def _short(paths: list[str], every: list[str]) -> list[str]:
    """The names of these modules without their path, where no other module is called so."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    same = [path for path in every if path.rpartition(".")[2] in names]
    return names if sorted(same) == sorted(paths) else paths
