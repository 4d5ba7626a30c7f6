"""One connection, as uvicorn has it, with the limits in time that uvicorn lacks.

Who sends the head of a request byte by byte, or asks and then does not read, would hold a
connection for ever. What uvicorn itself refuses is said in the API's own form.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorakit.server.errors import ApiError, error_content, error_response
from lorakit.server.options import Limits


def connection_class(limits: Limits) -> type[asyncio.Protocol]:
    """The class of connections under `limits`, for uvicorn's configuration."""

    class Connection(H11Protocol):
        _reading: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None
        _closing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.app = _full
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_request():
                self._stop_expecting()
            elif self._reading is None:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_expecting()
            self.resume_writing()
            if self._closing is not None:
                self._closing.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._writing is None:
                self._writing = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()
                self._writing = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._close()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._close()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = json.dumps(error_content(400, msg)).encode()
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                ]
                for event in (
                    h11.Response(status_code=400, headers=headers),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            self._close()

        def _in_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _expect_head(self) -> None:
            self._reading = self.loop.call_later(limits.header_seconds, self._head_is_late)

        def _stop_expecting(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _head_is_late(self) -> None:
            self._reading = None
            if not self._in_request():
                self._close()

        def _close(self) -> None:
            # A closed transport waits for its last bytes to be taken, however long that is.
            self.transport.close()
            if self._closing is None:
                self._closing = self.loop.call_later(limits.write_seconds, self.transport.abort)

    return Connection


async def _full(scope: Any, receive: Any, send: Any) -> None:
    error = ApiError(
        503,
        "too many connections are open: ask again later",
        retry_after=1,
        headers={"Connection": "close"},
    )
    await error_response(error)(scope, receive, send)
