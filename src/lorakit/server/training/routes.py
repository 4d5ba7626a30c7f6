"""The routes of the training protocol under `/api/v1`, as the Tinker SDK 0.38 calls them.

A request that computes is answered at once with an id, under which its result is polled. What is
wrong with it comes as its result too: a request that was refused at the door would leave a hole in
the sequence of its model, and the SDK repeats some refusals without end.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from lorakit.errors import InputError
from lorakit.server.errors import ApiError
from lorakit.server.gate import owner_of
from lorakit.server.guarded_routes import Level, needs
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoints import KINDS, Checkpoint, Run, expiry
from lorakit.server.training.futures import Promises, Result
from lorakit.server.training.service import TrainingService
from lorakit.server.training.wire import CONTENT_TYPE, head_of, read_pass

_PREFIX = "/api/v1"
_UNDER_WAY = 4096
"""How many requests of a key may be under way at once."""

Asked = TypeVar("Asked", bound=m.Message)
Handler = Callable[[Any, str], Coroutine[Any, Any, Result]]


class TrainingRoutes:
    """The routes over a service.

    Args:
        app: where they are added.
    """

    def __init__(self, app: FastAPI, service: TrainingService) -> None:
        self._app, self._service, self._promises = app, service, Promises()
        self._post("client/config", self._client_config)
        self._post("client/dynamic_config", self._nothing)
        self._post("telemetry", self._telemetry)
        self._get("healthz", self._health)
        self._get("get_server_capabilities", self._capabilities)
        self._post("create_session", self._create_session)
        self._post("session_heartbeat", self._heartbeat)
        self._post("sessions/{session_id}/finish", self._finish_session)
        self._get("sessions", self._sessions)
        self._get("sessions/{session_id}", self._session)
        self._post("create_model", self._create_model)
        self._post("get_info", self._info)
        self._post("unload_model", self._unload)
        self._post("forward_backward", self._forward_backward)
        self._post("optim_step", self._ordered(m.OptimStep, service.optim_step))
        self._post("save_weights", self._ordered(m.SaveWeights, service.save))
        self._post(
            "save_weights_for_sampler", self._ordered(m.SaveForSampler, service.save_for_sampler)
        )
        self._post("load_weights", self._load)
        self._post("create_sampling_session", self._create_sampler)
        self._get("samplers/{sampler_id}", self._sampler)
        self._post("asample", self._sample)
        self._post("retrieve_future", self._retrieve)
        self._post("cancel_future", self._cancel)
        self._post("weights_info", self._weights_info)
        self._get("training_runs", self._runs)
        self._get("training_runs/{run_id}", self._run)
        self._get("training_runs/{run_id}/checkpoints", self._checkpoints_of)
        self._get("checkpoints", self._checkpoints)
        one = "training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
        # A path takes what follows it, too: the longer ones come first.
        self._post(f"{one}/publish", self._publish)
        self._route("DELETE", f"{one}/publish", self._unpublish)
        self._route("PUT", f"{one}/ttl", self._set_ttl)
        self._route("DELETE", one, self._delete)

    def close(self) -> None:
        """Ends what is under way."""
        self._promises.cancel_all()
        self._service.close()

    # --- sessions -----------------------------------------------------------------------------

    async def _client_config(self, request: Request) -> Response:
        # Chunks of a batch in their order, which spares a wait for the first.
        return JSONResponse({"parallel_fwdbwd_chunks": False})

    async def _nothing(self, request: Request) -> Response:
        return JSONResponse({})

    async def _telemetry(self, request: Request) -> Response:
        return JSONResponse({"status": "accepted"})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _capabilities(self, request: Request) -> Response:
        engine = self._service.engine
        model = {
            "model_name": engine.model_name,
            "max_context_length": engine.context_length,
            "trainable": True,
            "sampleable": True,
        }
        return JSONResponse({"supported_models": [model]})

    async def _create_session(self, request: Request) -> Response:
        asked = await _read(m.CreateSession, request)
        session_id = self._service.create_session(asked, owner_of(request))
        return JSONResponse({"type": "create_session", "session_id": session_id})

    async def _heartbeat(self, request: Request) -> Response:
        asked = await _read(m.OfSession, request)
        try:
            self._service.session(asked.session_id, owner_of(request))
        except InputError as error:
            raise ApiError(410, str(error)) from error
        await self._service.tidy()
        return JSONResponse({"type": "session_heartbeat"})

    async def _finish_session(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        await _found(self._service.finish_session(session_id, owner_of(request)))
        return JSONResponse({})

    async def _sessions(self, request: Request) -> Response:
        return JSONResponse({"sessions": self._service.sessions(owner_of(request))})

    async def _session(self, request: Request) -> Response:
        session = _there(
            lambda: self._service.session(request.path_params["session_id"], owner_of(request))
        )
        return JSONResponse(
            {
                "training_run_ids": session.runs,
                "sampler_ids": session.samplers,
                "user_metadata": session.user_metadata,
                "display_name": session.display_name,
            }
        )

    # --- what computes ------------------------------------------------------------------------

    async def _create_model(self, request: Request) -> Response:
        asked = await _read(m.CreateModel, request)
        owner = owner_of(request)

        async def work() -> Result:
            model_id = await self._service.create_model(asked, owner)
            return {"type": "create_model", "model_id": model_id}

        return self._promise(f"{asked.session_id}:train:{asked.model_seq_id}:0", owner, work())

    async def _info(self, request: Request) -> Response:
        asked = await _read(m.OfModel, request)
        return JSONResponse(_there(lambda: self._service.info(asked.model_id, owner_of(request))))

    async def _unload(self, request: Request) -> Response:
        asked = await _read(m.OfModel, request)
        owner = owner_of(request)

        async def work() -> Result:
            await self._service.unload(asked.model_id, owner)
            return {"type": "unload_model", "model_id": asked.model_id}

        return self._promise(f"{asked.model_id}:unload", owner, work())

    async def _forward_backward(self, request: Request) -> Response:
        body, owner = await request.body(), owner_of(request)
        try:
            model_id, seq_id, _ = head_of(body)
        except InputError as error:
            raise ApiError(422, str(error)) from error

        async def work() -> Result:
            try:
                asked = read_pass(body)
            except InputError as error:
                return await self._failing(model_id, seq_id, owner, error)
            return await self._service.forward_backward(asked, owner)

        return self._promise(f"{model_id}:{seq_id}", owner, work())

    def _ordered(
        self, kind: type[Asked], handle: Callable[[Asked, str], Coroutine[Any, Any, Result]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A route of requests that have their place in a model's sequence."""

        async def route(request: Request) -> Response:
            data, owner = await request.json(), owner_of(request)
            try:
                asked = kind.model_validate(data)
            except ValidationError as error:
                given = data if isinstance(data, dict) else {}
                model_id, seq_id = (given.get(name) for name in ("model_id", "seq_id"))
                if not isinstance(model_id, str) or not isinstance(seq_id, int):
                    raise ApiError(422, _shown(error)) from error
                work = self._failing(model_id, seq_id, owner, InputError(_shown(error)))
            else:
                model_id, seq_id = getattr(asked, "model_id"), getattr(asked, "seq_id")  # noqa: B009
                work = handle(asked, owner)
            return self._promise(f"{model_id}:{seq_id}", owner, work)

        route.__name__ = f"training_{kind.__name__}"
        return route

    async def _failing(self, model_id: str, seq_id: int, owner: str, error: InputError) -> Result:
        """Fails with `error` in the place that the request has in its model's sequence."""

        async def fail() -> Result:
            raise error

        return await self._service.run(model_id, owner).in_order(seq_id, fail)

    async def _load(self, request: Request) -> Response:
        asked, owner = await _read(m.LoadWeights, request), owner_of(request)
        if asked.model_id is not None:
            request_id = f"{asked.model_id}:{asked.seq_id}"
        else:
            request_id = f"{asked.session_id}:train:{asked.model_seq_id}:0"
        return self._promise(request_id, owner, self._service.load(asked, owner))

    async def _create_sampler(self, request: Request) -> Response:
        asked = await _read(m.CreateSampler, request)
        sampler_id = await _found(self._service.create_sampler(asked, owner_of(request)))
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler_id})

    async def _sampler(self, request: Request) -> Response:
        sampler = _there(
            lambda: self._service.samplers.find(
                request.path_params["sampler_id"], owner_of(request)
            )
        )
        return JSONResponse(
            {
                "sampler_id": sampler.sampler_id,
                "base_model": self._service.engine.model_name,
                "model_path": sampler.model_path,
            }
        )

    async def _sample(self, request: Request) -> Response:
        owner = owner_of(request)
        data = await request.json()
        request_id = uuid.uuid4().hex
        try:
            asked = m.Sample.model_validate(data)
        except ValidationError as error:
            return self._promise(request_id, owner, _failed(InputError(_shown(error))))
        if asked.sampling_session_id is not None and asked.seq_id is not None:
            request_id = f"{asked.sampling_session_id}:{asked.seq_id}"
        ids = [f"{request_id}:{number}" for number in range(asked.num_samples)]
        work = self._service.samplers.sample(asked, owner)
        return self._promise(request_id, owner, work, sample_sequence_ids=ids)

    def _promise(
        self, request_id: str, owner: str, work: Coroutine[Any, Any, Result], **more: Any
    ) -> Response:
        if self._promises.owned(owner) >= _UNDER_WAY:
            work.close()
            raise ApiError(429, f"{_UNDER_WAY} requests of this key are under way", retry_after=1)
        promise = self._promises.open(request_id, owner, work)
        return JSONResponse({"request_id": promise.request_id, **more})

    async def _retrieve(self, request: Request) -> Response:
        asked = await _read(m.Retrieve, request)
        promise = self._promises.find(asked.request_id, owner_of(request))
        if promise is None:
            raise ApiError(404, f"there is no request {asked.request_id!r}, or its result is gone")
        result = await self._promises.poll(promise)
        if result is None:
            waiting = {"request_id": asked.request_id, "queue_state": "active"}
            return JSONResponse({"type": "try_again", "queue_state_reason": None, **waiting})
        if isinstance(result, bytes):
            return Response(result, media_type=CONTENT_TYPE)
        return JSONResponse(result)

    async def _cancel(self, request: Request) -> Response:
        asked = await _read(m.Retrieve, request)
        promise = self._promises.find(asked.request_id, owner_of(request))
        if promise is not None:
            promise.task.cancel()
        return JSONResponse({})

    # --- runs and checkpoints -----------------------------------------------------------------

    async def _runs(self, request: Request) -> Response:
        runs = self._service.store.runs(owner_of(request))
        some, cursor = _page(runs, request)
        return JSONResponse({"training_runs": [self._shown_run(r) for r in some], "cursor": cursor})

    async def _run(self, request: Request) -> Response:
        return JSONResponse(self._shown_run(self._run_of(request)))

    async def _checkpoints_of(self, request: Request) -> Response:
        found = self._service.store.checkpoints(self._run_of(request).run_id)
        return JSONResponse({"checkpoints": [self._shown_checkpoint(c) for c in found]})

    async def _checkpoints(self, request: Request) -> Response:
        store = self._service.store
        every = [c for run in store.runs(owner_of(request)) for c in store.checkpoints(run.run_id)]
        some, cursor = _page(sorted(every, key=lambda c: c.created, reverse=True), request)
        shown = [self._shown_checkpoint(each) for each in some]
        return JSONResponse({"checkpoints": shown, "cursor": cursor})

    async def _weights_info(self, request: Request) -> Response:
        asked, store = await _read(m.WeightsInfo, request), self._service.store
        found = _there(lambda: store.find(asked.tinker_path, owner_of(request)))
        run = store.run(found.run_id, None)
        parts = {name: run.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
        return JSONResponse(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": run.lora["rank"],
                **parts,
            }
        )

    async def _publish(self, request: Request) -> Response:
        self._service.store.change(self._checkpoint_of(request), public=True)
        return Response(status_code=204)

    async def _unpublish(self, request: Request) -> Response:
        self._service.store.change(self._checkpoint_of(request), public=False)
        return Response(status_code=204)

    async def _set_ttl(self, request: Request) -> Response:
        asked = await _read(m.Ttl, request)
        self._service.store.change(self._checkpoint_of(request), expires=expiry(asked.ttl_seconds))
        return Response(status_code=204)

    async def _delete(self, request: Request) -> Response:
        await self._service.delete(self._checkpoint_of(request))
        return Response(status_code=204)

    def _run_of(self, request: Request) -> Run:
        run_id = request.path_params["run_id"]
        return _there(lambda: self._service.store.run(run_id, owner_of(request)))

    def _checkpoint_of(self, request: Request) -> Checkpoint:
        run, name = self._run_of(request), request.path_params["checkpoint_id"]
        path = f"tinker://{run.run_id}/{name}"
        return _there(lambda: self._service.store.find(path, owner_of(request)))

    def _shown_run(self, run: Run) -> dict[str, Any]:
        found = self._service.store.checkpoints(run.run_id)
        last = {kind: next((c for c in found if c.kind == kind), None) for kind in KINDS}
        return {
            "training_run_id": run.run_id,
            "base_model": run.base_model,
            "model_owner": run.owner,
            "is_lora": True,
            "lora_rank": run.lora["rank"],
            "last_request_time": run.last_request,
            "last_checkpoint": self._shown_or_none(last["weights"]),
            "last_sampler_checkpoint": self._shown_or_none(last["sampler_weights"]),
            "user_metadata": run.user_metadata,
        }

    def _shown_or_none(self, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
        return None if checkpoint is None else self._shown_checkpoint(checkpoint)

    def _shown_checkpoint(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "checkpoint_id": checkpoint.checkpoint_id,
            "checkpoint_type": KINDS[checkpoint.kind],
            "time": checkpoint.created,
            "tinker_path": checkpoint.path,
            "size_bytes": self._service.store.size(checkpoint),
            "public": checkpoint.public,
            "user_metadata": checkpoint.user_metadata,
            "expires_at": checkpoint.expires,
        }

    # --- adding -------------------------------------------------------------------------------

    def _post(self, path: str, handle: Callable[[Request], Any]) -> None:
        self._route("POST", path, handle)

    def _get(self, path: str, handle: Callable[[Request], Any]) -> None:
        self._route("GET", path, handle)

    def _route(self, method: str, path: str, handle: Callable[[Request], Any]) -> None:
        self._app.add_api_route(
            f"{_PREFIX}/{path}",
            handle,
            methods=[method],
            dependencies=needs(Level.API_KEY),
            response_model=None,
            include_in_schema=False,
        )


async def _read(kind: type[Asked], request: Request) -> Asked:
    """The body.

    Raises:
        ApiError: 422, it is not of this kind.
    """
    try:
        return kind.model_validate(await request.json())
    except ValidationError as error:
        raise ApiError(422, _shown(error)) from error


def _shown(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


async def _failed(error: InputError) -> Result:
    raise error


def _there(find: Callable[[], Any]) -> Any:
    """What `find` finds.

    Raises:
        ApiError: 404, it does not.
    """
    try:
        return find()
    except InputError as error:
        raise ApiError(404, str(error)) from error


async def _found(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except InputError as error:
        raise ApiError(404, str(error)) from error


def _page(every: list[Any], request: Request) -> tuple[list[Any], dict[str, int]]:
    """As much of a list as the request asks for, and where that lies in it."""
    limit, offset = (
        int(value) if (value := request.query_params.get(name, "")).isdigit() else default
        for name, default in (("limit", 20), ("offset", 0))
    )
    cursor = {"offset": offset, "limit": limit, "total_count": len(every)}
    return every[offset : offset + limit], cursor
