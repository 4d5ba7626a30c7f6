"""Writes runs' weights: the thread that computes copies them in a run's order, others write.

A run's later steps wait for the copy, not for the disk; its next save waits for both, so that
files appear in the order of the requests, and no run has more than one copy in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.engine.adapter_copy import AdapterCopy
from lorakit.engine.engine import Engine
from lorakit.errors import InputError
from lorakit.server.training import messages as m
from lorakit.server.training.age_files import encrypt_files
from lorakit.server.training.checkpoints import Checkpoint, Store, expiry, now
from lorakit.server.training.tenants import LiveRun

_AT_ONCE = 4
"""How many runs are written at once, and so the most copies of weights that are in memory."""

log = logging.getLogger("lorakit.training")


class Saving:
    """Saves of an engine's runs. All methods are for the server's event loop."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine, self._store = engine, store
        self._writing = asyncio.Semaphore(_AT_ONCE)

    @asynccontextmanager
    async def turn(self, run: LiveRun) -> AsyncIterator[None]:
        """Is held from before the copy until it is written."""
        async with run.saving, self._writing:
            yield

    async def snapshot(self, run: LiveRun, folder: Path) -> int:
        """Writes a run's weights as they are when this is its turn; how often they had changed."""
        changes = run.changes
        copied = await self._copy(run, optimizer=False)
        await asyncio.to_thread(copied.save, folder)
        return changes

    async def checkpoint(
        self,
        run: LiveRun,
        kind: str,
        name: str,
        asked: m.SaveWeights | m.SaveForSampler | m.SaveExternal,
        recipients: Sequence[Any] = (),
    ) -> str:
        """Writes a checkpoint, of weights with the optimizer's state; its `tinker://` path.

        Args:
            recipients: whom its files are encrypted to.
        """
        checkpoint = Checkpoint(
            run.record.run_id,
            kind,
            name,
            now().isoformat(),
            expires=expiry(asked.ttl_seconds),
            user_metadata=asked.user_metadata,
        )
        copied = await self._copy(run, optimizer=kind == "weights")

        def write(folder: Path) -> None:
            copied.save(folder)
            if recipients:
                encrypt_files(folder, recipients)

        await asyncio.to_thread(self._store.save, checkpoint, write, asked.overwrite)
        with suppress(InputError):  # what was there before is not sampled from any more
            self._engine.pool.unregister(checkpoint.path)
        run.record = replace(run.record, last_request=now().isoformat())
        await asyncio.to_thread(self._store.write_run, run.record)
        log.info("%s is saved", checkpoint.path)
        return checkpoint.path

    async def _copy(self, run: LiveRun, *, optimizer: bool) -> AdapterCopy:
        resident, owner = self._engine.resident, run.record.owner
        copied: AdapterCopy = await asyncio.wrap_future(
            self._engine.training.call(
                run.adapter, lambda: resident.copied(run.adapter, optimizer=optimizer), owner=owner
            )
        )
        return copied
