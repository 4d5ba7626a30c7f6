"""Routes over what is on disk: runs, checkpoints, their publication, expiry and download."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections import defaultdict
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from lorakit.server.errors import ApiError
from lorakit.server.guarded_routes import Level
from lorakit.server.keys import caller_of
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoints import KINDS, Checkpoint, Run, expiry
from lorakit.server.training.requests import PREFIX, add_route, found, page, read
from lorakit.server.training.service import TrainingService

_URL_SECONDS = 3600


class CheckpointRoutes:
    """The routes over a service.

    Args:
        app: where they are added.
    """

    def __init__(self, app: FastAPI, service: TrainingService) -> None:
        self._service, self._store = service, service.store
        self._secret = secrets.token_bytes(32)
        add_route(app, "POST", "weights_info", self._weights_info)
        add_route(app, "GET", "training_runs", self._runs)
        add_route(app, "GET", "training_runs/{run_id}", self._run)
        add_route(app, "GET", "training_runs/{run_id}/checkpoints", self._checkpoints_of)
        add_route(app, "GET", "checkpoints", self._checkpoints)
        add_route(app, "GET", "billing/usage/checkpoints/current", self._usage)
        one = "training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
        # A path takes what follows it, too: the longer ones come first.
        add_route(app, "POST", f"{one}/publish", self._publish)
        add_route(app, "DELETE", f"{one}/publish", self._unpublish)
        add_route(app, "PUT", f"{one}/ttl", self._set_ttl)
        add_route(app, "GET", f"{one}/external_weights_urls", self._urls)
        add_route(app, "DELETE", one, self._delete)
        file = "downloads/{run_id}/{kind}/{name}/{file}"
        add_route(app, "GET", file, self._download, Level.ANYONE)  # the URL is signed

    # --- runs ---------------------------------------------------------------------------------
    # What looks through folders is no coroutine: it is called in a thread.

    def _runs(self, request: Request) -> Response:
        some, cursor = page(self._store.runs(caller_of(request)), request)
        return JSONResponse({"training_runs": [self._shown_run(r) for r in some], "cursor": cursor})

    def _run(self, request: Request) -> Response:
        return JSONResponse(self._shown_run(self._run_of(request)))

    def _run_of(self, request: Request) -> Run:
        return found(lambda: self._store.run(request.path_params["run_id"], caller_of(request)))

    def _shown_run(self, run: Run) -> dict[str, Any]:
        every = self._store.checkpoints(run.run_id)
        last = {kind: next((c for c in every if c.kind == kind), None) for kind in KINDS}
        return {
            "training_run_id": run.run_id,
            "base_model": run.base_model,
            "model_owner": self._service.label(run.owner),
            "is_lora": True,
            "lora_rank": run.lora["rank"],
            "last_request_time": run.last_request,
            "last_checkpoint": self._shown_or_none(last["weights"]),
            "last_sampler_checkpoint": self._shown_or_none(last["sampler_weights"]),
            "user_metadata": run.user_metadata,
        }

    # --- checkpoints --------------------------------------------------------------------------

    def _checkpoints_of(self, request: Request) -> Response:
        every = self._store.checkpoints(self._run_of(request).run_id)
        return JSONResponse({"checkpoints": [self._shown(c) for c in every]})

    def _checkpoints(self, request: Request) -> Response:
        store = self._store
        every = [c for run in store.runs(caller_of(request)) for c in store.checkpoints(run.run_id)]
        some, cursor = page(sorted(every, key=lambda c: c.created, reverse=True), request)
        return JSONResponse({"checkpoints": [self._shown(c) for c in some], "cursor": cursor})

    async def _weights_info(self, request: Request) -> Response:
        asked = await read(m.WeightsInfo, request)
        one = found(lambda: self._store.find(asked.tinker_path, caller_of(request)))
        run = self._store.run(one.run_id)
        parts = {name: run.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
        rank = run.lora["rank"]
        return JSONResponse(
            {"base_model": run.base_model, "is_lora": True, "lora_rank": rank, **parts}
        )

    def _usage(self, request: Request) -> Response:
        """How many bytes each key's checkpoints have, of those that the caller sees."""
        counts: defaultdict[str, list[int]] = defaultdict(list)
        for run in self._store.runs(caller_of(request)):
            counts[run.owner] += map(self._store.size, self._store.checkpoints(run.run_id))
        data = [
            {
                "user_name": self._service.label(owner),
                "checkpoint_count": len(sizes),
                "size_bytes": sum(sizes),
                "size_gigabytes": sum(sizes) / 1e9,
            }
            for owner, sizes in counts.items()
        ]
        return JSONResponse({"data": data})

    async def _publish(self, request: Request) -> Response:
        self._service.set_public(self._checkpoint_of(request), True)
        return Response(status_code=204)

    async def _unpublish(self, request: Request) -> Response:
        self._service.set_public(self._checkpoint_of(request), False)
        return Response(status_code=204)

    async def _set_ttl(self, request: Request) -> Response:
        asked = await read(m.Ttl, request)
        self._store.change(self._checkpoint_of(request), expires=expiry(asked.ttl_seconds))
        return Response(status_code=204)

    async def _delete(self, request: Request) -> Response:
        await self._service.delete(self._checkpoint_of(request))
        return Response(status_code=204)

    def _checkpoint_of(self, request: Request) -> Checkpoint:
        run, name = self._run_of(request), request.path_params["checkpoint_id"]
        path = f"tinker://{run.run_id}/{name}"
        return found(lambda: self._store.find(path, caller_of(request)))

    def _shown_or_none(self, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
        return None if checkpoint is None else self._shown(checkpoint)

    def _shown(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "checkpoint_id": checkpoint.checkpoint_id,
            "checkpoint_type": KINDS[checkpoint.kind],
            "time": checkpoint.created,
            "tinker_path": checkpoint.path,
            "size_bytes": self._store.size(checkpoint),
            "public": checkpoint.public,
            "user_metadata": checkpoint.user_metadata,
            "expires_at": checkpoint.expires,
        }

    # --- downloads ----------------------------------------------------------------------------

    async def _urls(self, request: Request) -> Response:
        """A URL for each file, which needs no key and is good for an hour."""
        checkpoint = self._checkpoint_of(request)
        if checkpoint.kind != "external_weights":
            raise ApiError(
                400, f"{checkpoint.path} is not for download: save it with save_weights_external"
            )
        expires = int(time.time()) + _URL_SECONDS
        base = f"{str(request.base_url).rstrip('/')}{PREFIX}/downloads"
        urls = {}
        for file in self._store.files(checkpoint):
            place = f"{checkpoint.run_id}/{checkpoint.checkpoint_id}/{file.name}"
            signature = self._signature(place, expires)
            urls[file.name] = f"{base}/{quote(place)}?expires={expires}&signature={signature}"
        until = datetime.fromtimestamp(expires, UTC).isoformat()
        return JSONResponse({"urls": urls, "expires": until})

    async def _download(self, request: Request) -> Response:
        run_id, kind, name, file = (
            str(request.path_params[part]) for part in ("run_id", "kind", "name", "file")
        )
        expires, signature = (request.query_params.get(n, "") for n in ("expires", "signature"))
        good = expires.isdigit() and int(expires) >= time.time()
        wanted = self._signature(f"{run_id}/{kind}/{name}/{file}", int(expires) if good else 0)
        if not good or not hmac.compare_digest(wanted.encode(), signature.encode()):
            raise ApiError(403, "this URL is not signed by this server, or its time is over")
        path = self._store.folder(Checkpoint(run_id, kind, name, "")) / file
        if not await asyncio.to_thread(path.is_file):
            raise ApiError(404, "the checkpoint is gone")
        return FileResponse(path, media_type="application/octet-stream")

    def _signature(self, place: str, expires: int) -> str:
        return hmac.new(self._secret, f"{expires}:{place}".encode(), sha256).hexdigest()
