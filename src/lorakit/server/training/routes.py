"""The routes of the training protocol under `/api/v1`, as the Tinker SDK 0.38 calls them.

A request that computes is answered at once with an id, under which its result is polled. What is
wrong with it comes as its result too: a request that was refused at the door would leave a hole in
the sequence of its model, and the SDK repeats some refusals without end.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from lorakit.errors import InputError
from lorakit.server.errors import ApiError
from lorakit.server.guarded_routes import Level, needs
from lorakit.server.keys import Caller, caller_of
from lorakit.server.training import messages as m
from lorakit.server.training.checkpoint_routes import CheckpointRoutes
from lorakit.server.training.figures import TrainingFigures
from lorakit.server.training.futures import POLL_SECONDS, Promises, Result
from lorakit.server.training.refused_routes import add_refused_routes
from lorakit.server.training.requests import Asked, add_route, awaited, found, page, read, shown
from lorakit.server.training.service import TrainingService
from lorakit.server.training.wire import CONTENT_TYPE, head_of, read_pass

_UNDER_WAY = 4096
"""How many requests of a key may be under way at once."""
_LARGE = 1 << 17  # bytes of a message that is read in a thread
_OF_A_CLONE = 1_000_000_000
"""Requests of the SDK's n-th copy of a sampling client have numbers from n times this."""


class TrainingRoutes:
    """The routes over a service.

    Args:
        app: where they are added.
        everyone: whether every caller sees the figures of all keys.

    Attributes:
        figures: what is counted.
    """

    def __init__(self, app: FastAPI, service: TrainingService, *, everyone: bool = False) -> None:
        self._app, self._service, self._promises = app, service, Promises()
        self.figures = TrainingFigures(service, everyone)
        self._post("client/config", self._client_config)
        self._post("client/dynamic_config", self._dynamic_config)
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
        self._post("save_weights_external", self._ordered(m.SaveExternal, service.save_external))
        self._post(
            "save_weights_for_sampler", self._ordered(m.SaveForSampler, service.save_for_sampler)
        )
        self._post("load_weights", self._load)
        self._post("create_sampling_session", self._create_sampler)
        self._post("join_sampling_session", self._join_sampler)
        self._get("samplers/{sampler_id}", self._sampler)
        self._post("asample", self._sample)
        # Results can be fetched to the end of the server, however busy it is.
        self._post("retrieve_future", self._retrieve, always=True)
        self._post("retrieve_futures", self._retrieve_ended, always=True)
        self._post("cancel_future", self._cancel)
        app.add_api_route(
            "/training/state",
            self._state,
            dependencies=needs(Level.API_KEY),
            response_model=None,
            include_in_schema=False,
        )
        CheckpointRoutes(app, service)
        add_refused_routes(app)

    @property
    def under_way(self) -> int:
        """How many requests are computed, or wait."""
        return self._promises.under_way()

    def drain(self) -> None:
        """What can still be computed is; the rest fails."""
        self._service.drain()

    def stop(self) -> None:
        """Fails what is under way, which its clients are told."""
        self._promises.cancel_all("the server ends: load the last checkpoint when it is back")

    def close(self) -> None:
        """Gives back what the service holds."""
        self._service.close()

    async def _state(self, request: Request) -> Response:
        """What the page at `/training` shows."""
        state = await run_in_threadpool(self.figures.state, caller_of(request))
        return JSONResponse(state)

    # --- sessions -----------------------------------------------------------------------------

    async def _client_config(self, request: Request) -> Response:
        return JSONResponse(
            {
                # Chunks of a batch in their order, which spares a wait for the first.
                "parallel_fwdbwd_chunks": False,
                # One poll for a sampling session, and not one for each of its requests.
                "sample_use_retrieve_futures": True,
                "sample_join_sampling_session": True,
            }
        )

    async def _dynamic_config(self, request: Request) -> Response:
        return JSONResponse({"sample_cancel_enabled": True})

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
        asked = await read(m.CreateSession, request)
        session_id = self._service.sessions.create(asked, caller_of(request))
        return JSONResponse({"type": "create_session", "session_id": session_id})

    async def _heartbeat(self, request: Request) -> Response:
        asked = await read(m.OfSession, request)
        try:
            self._service.sessions.find(asked.session_id, caller_of(request))
        except InputError as error:
            raise ApiError(410, str(error)) from error
        await self._service.tidy()
        return JSONResponse({"type": "session_heartbeat"})

    async def _finish_session(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        found(lambda: self._service.finish_session(session_id, caller_of(request)))
        return JSONResponse({})

    async def _sessions(self, request: Request) -> Response:
        sessions = self._service.sessions.of(caller_of(request))
        some, _ = page([session.session_id for session in sessions], request)
        return JSONResponse({"sessions": some})

    async def _session(self, request: Request) -> Response:
        session = found(
            lambda: self._service.sessions.find(
                request.path_params["session_id"], caller_of(request)
            )
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
        asked = await read(m.CreateModel, request)
        caller = caller_of(request)

        async def work() -> Result:
            model_id = await self._service.create_model(asked, caller)
            return {"type": "create_model", "model_id": model_id}

        return self._promise(f"{asked.session_id}:train:{asked.model_seq_id}:0", caller, work())

    async def _info(self, request: Request) -> Response:
        asked = await read(m.OfModel, request)
        return JSONResponse(found(lambda: self._service.info(asked.model_id, caller_of(request))))

    async def _unload(self, request: Request) -> Response:
        asked = await read(m.OfModel, request)
        caller = caller_of(request)

        async def work() -> Result:
            await self._service.unload(asked.model_id, caller)
            return {"type": "unload_model", "model_id": asked.model_id}

        return self._promise(f"{asked.model_id}:unload", caller, work())

    async def _forward_backward(self, request: Request) -> Response:
        body, caller = await request.body(), caller_of(request)
        large = len(body) > _LARGE  # then others are answered meanwhile
        try:
            model_id, seq_id, tokens = (
                await run_in_threadpool(head_of, body) if large else head_of(body)
            )
        except InputError as error:
            raise ApiError(422, str(error)) from error

        async def work() -> Result:
            try:
                self._service.quotas.require_request(tokens)
                asked = await run_in_threadpool(read_pass, body) if large else read_pass(body)
            except InputError as error:
                return await self._failing(model_id, seq_id, caller, error)
            return await self._service.forward_backward(asked, caller)

        async def counted() -> Result:
            with self._service.quotas.under_way(caller.owner, tokens):
                return await work()

        if not self._service.is_awaited(model_id, seq_id, caller):
            self._require_room(f"{model_id}:{seq_id}", caller, tokens)
        return self._promise(f"{model_id}:{seq_id}", caller, counted())

    def _ordered(
        self, kind: type[Asked], handle: Callable[[Asked, Caller], Coroutine[Any, Any, Result]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A route of requests that have their place in a model's sequence."""

        async def route(request: Request) -> Response:
            data, caller = await request.json(), caller_of(request)
            try:
                asked = kind.model_validate(data)
            except ValidationError as error:
                given = data if isinstance(data, dict) else {}
                model_id, seq_id = (given.get(name) for name in ("model_id", "seq_id"))
                if not isinstance(model_id, str) or not isinstance(seq_id, int):
                    raise ApiError(422, shown(error)) from error
                work = self._failing(model_id, seq_id, caller, InputError(shown(error)))
            else:
                model_id, seq_id = getattr(asked, "model_id"), getattr(asked, "seq_id")  # noqa: B009
                work = handle(asked, caller)
            return self._promise(f"{model_id}:{seq_id}", caller, work)

        route.__name__ = f"training_{kind.__name__}"
        return route

    async def _failing(
        self, model_id: str, seq_id: int, caller: Caller, error: InputError
    ) -> Result:
        """Fails with `error` in the place that the request has in its model's sequence."""

        async def fail() -> Result:
            raise error

        return await self._service.run(model_id, caller).in_order(seq_id, fail)

    async def _load(self, request: Request) -> Response:
        asked, caller = await read(m.LoadWeights, request), caller_of(request)
        if asked.model_id is not None:
            request_id = f"{asked.model_id}:{asked.seq_id}"
        else:
            request_id = f"{asked.session_id}:train:{asked.model_seq_id}:0"
        return self._promise(request_id, caller, self._service.load(asked, caller))

    async def _create_sampler(self, request: Request) -> Response:
        asked = await read(m.CreateSampler, request)
        sampler_id = await awaited(self._service.create_sampler(asked, caller_of(request)))
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler_id})

    async def _sampler(self, request: Request) -> Response:
        sampler = found(
            lambda: self._service.samplers.find(
                request.path_params["sampler_id"], caller_of(request)
            )
        )
        return JSONResponse(
            {
                "sampler_id": sampler.sampler_id,
                "base_model": self._service.engine.model_name,
                "model_path": sampler.model_path,
            }
        )

    async def _join_sampler(self, request: Request) -> Response:
        asked = await read(m.JoinSampler, request)
        sampler = found(
            lambda: self._service.samplers.find(asked.sampling_session_id, caller_of(request))
        )
        number = next(sampler.clients)
        return JSONResponse({"type": "join_sampling_session", "client_counter": number})

    async def _sample(self, request: Request) -> Response:
        caller = caller_of(request)
        data = await request.json()
        given = data if isinstance(data, dict) else {}
        session_id, seq_id = given.get("sampling_session_id"), given.get("seq_id")
        request_id, group = uuid.uuid4().hex, ""
        if isinstance(session_id, str) and isinstance(seq_id, int):
            request_id, group = f"{session_id}:{seq_id}", _group(session_id, seq_id // _OF_A_CLONE)
        try:
            asked = m.Sample.model_validate(data)
        except ValidationError as error:
            failed = _failed(InputError(shown(error)))
            return self._promise(request_id, caller, failed, group)
        self._require_room(request_id, caller, self._service.samplers.cost(asked))
        ids = [f"{request_id}:{number}" for number in range(asked.num_samples)]
        work = self._service.samplers.sample(asked, caller)
        return self._promise(request_id, caller, work, group, sample_sequence_ids=ids)

    def _require_room(self, request_id: str, caller: Caller, tokens: int) -> None:
        """Refuses for now what is too much beside what is under way."""
        quotas = self._service.quotas
        known = self._promises.find(request_id, caller.owner) is not None
        if not known and tokens <= quotas.limits.tokens:  # more than that fails by itself
            quotas.require_room(caller.owner, tokens)

    def _promise(
        self,
        request_id: str,
        caller: Caller,
        work: Coroutine[Any, Any, Result],
        group: str = "",
        **more: Any,
    ) -> Response:
        owner = caller.owner
        if self._promises.under_way(owner) >= _UNDER_WAY:
            work.close()
            raise ApiError(429, f"{_UNDER_WAY} requests of this key are under way", retry_after=1)
        promise = self._promises.open(request_id, owner, work, group)
        return JSONResponse({"request_id": promise.request_id, **more})

    async def _retrieve(self, request: Request) -> Response:
        asked = await read(m.Retrieve, request)
        promise = self._promises.find(asked.request_id, caller_of(request).owner)
        if promise is None:
            raise ApiError(404, f"there is no request {asked.request_id!r}, or its result is gone")
        result = await self._promises.poll(promise)
        if result is None:
            waiting = {"request_id": asked.request_id, "queue_state": "active"}
            return JSONResponse({"type": "try_again", "queue_state_reason": None, **waiting})
        if isinstance(result, bytes):
            return Response(result, media_type=CONTENT_TYPE)
        return JSONResponse(result)

    async def _retrieve_ended(self, request: Request) -> Response:
        asked, caller = await read(m.RetrieveEnded, request), caller_of(request)
        session_id = asked.target.sampling_session_id
        sampler = found(lambda: self._service.samplers.find(session_id, caller))
        self._promises.drop(caller.owner, asked.retrieved_request_ids)
        wait = POLL_SECONDS if asked.timeout is None else min(asked.timeout, POLL_SECONDS)
        group = _group(sampler.sampler_id, asked.target.cloned_sampler_id)
        ended = await self._promises.ended(caller.owner, group, asked.prev_cursor, wait)
        completions = [
            {"state": "failed", "request_id": promise.request_id}
            if promise.failed
            else {
                "state": "finished",
                "request_id": promise.request_id,
                "response_payload_uncompressed_size": promise.size,
            }
            for promise in ended
        ]
        cursor = max([asked.prev_cursor, *(promise.number for promise in ended)])
        return JSONResponse({"completions": completions, "cursor": cursor})

    async def _cancel(self, request: Request) -> Response:
        asked = await read(m.Retrieve, request)
        promise = self._promises.find(asked.request_id, caller_of(request).owner)
        if promise is not None and promise.group:  # a model's requests keep their order
            promise.task.cancel()
        return JSONResponse({})

    # --- adding -------------------------------------------------------------------------------

    def _post(self, path: str, handle: Callable[[Request], Any], *, always: bool = False) -> None:
        add_route(self._app, "POST", path, handle, when_ending=always, when_busy=always)

    def _get(self, path: str, handle: Callable[[Request], Any]) -> None:
        add_route(self._app, "GET", path, handle)


def _group(sampling_session_id: str, clone: int) -> str:
    return f"{sampling_session_id}/{clone}"


async def _failed(error: InputError) -> Result:
    raise error
