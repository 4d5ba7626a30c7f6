"""`POST /v1/responses`: OpenAI's Responses API over the same answers as chats.

A response that the client has not forbidden to store is kept with its conversation, in memory and
up to a limit, so that the next request can name it in `previous_response_id`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.server.bodies import client_of
from lorakit.server.errors import ApiError, error_content
from lorakit.server.event_streams import EventStream, while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.message_parts import CallPart, MessageParts, Parts
from lorakit.server.open_answers import Desk, OpenAnswers, finish_reason
from lorakit.server.payloads import ChatRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.response_payloads import ResponsesRequest
from lorakit.server.tool_choice import check_choice

_KEPT = 1024
_KEPT_CHARACTERS = 32 << 20


class Conversations:
    """The conversations of responses, those of the latest ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._characters = 0

    def keep(self, owner: str, ident: str, messages: list[dict[str, Any]]) -> None:
        """Keeps a conversation; the oldest ones leave when there are too many."""
        text = json.dumps(messages)
        self._kept[owner, ident] = text
        self._characters += len(text)
        while len(self._kept) > _KEPT or self._characters > _KEPT_CHARACTERS:
            _, left = self._kept.popitem(last=False)
            self._characters -= len(left)

    def find(self, owner: str, ident: str | None) -> list[dict[str, Any]]:
        """The messages up to a response, with its own; none without a response.

        Raises:
            ApiError: 404, there is none of this id, or no longer.
        """
        if ident is None:
            return []
        if (text := self._kept.get((owner, ident))) is None:
            raise ApiError(
                404,
                f"there is no response {ident!r}: it is another's, or was not stored, or left the "
                "memory; send its conversation in input",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        found: list[dict[str, Any]] = json.loads(text)
        return found


async def respond_to(
    request: Request,
    asked: ResponsesRequest,
    desk: Desk,
    prompts: Prompts,
    conversations: Conversations,
) -> Response:
    """Answers items.

    Raises:
        ApiError, InputError: it cannot be.
    """
    caller = caller_of(request)
    before = conversations.find(caller.owner, asked.previous_response_id)
    chat = asked.chat(before)
    adapter = await desk.adapter(asked.model, caller)
    desk.require_kind(adapter, chat)
    deadline = desk.deadline()
    desk.require_room(1)
    check_choice(chat)
    size = len(await request.body()) + sum(len(str(message)) for message in before)
    work = prompts.of_chat(adapter, chat, client_of(request), size)
    prompt, reads = await while_wanted(request, work, deadline, desk.late())
    given = [prompt.input_ids], adapter, chat, deadline, prompt.pictures
    answers = await desk.hand_in(*given, owner=caller.owner)
    most = 1 if asked.parallel_tool_calls is False else None
    parts = MessageParts(reads, chat.shown_tools(), most)
    written = _Written(asked, chat, parts)

    def ended() -> None:
        if asked.store is not False:
            conversation = [*before, *asked.messages(), written.message()]
            conversations.keep(caller.owner, written.ident, conversation)

    if asked.stream:
        return EventStream(answers, _events(answers, written, ended))
    try:
        [answer] = await while_wanted(request, answers.whole())
    finally:
        answers.close()
    for _ in written.add(answer.text, answer.finish_reason):
        pass
    ended()
    return JSONResponse(written.response(answers))


class _Written:
    """A response while it is written: its items, and the events that tell of them."""

    def __init__(self, asked: ResponsesRequest, chat: ChatRequest, parts: MessageParts) -> None:
        self.ident, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._asked, self._chat, self._parts = asked, chat, parts
        self._items: list[dict[str, Any]] = []
        self._why: str | None = None

    def add(self, text: str, why: str | None) -> Iterator[dict[str, Any]]:
        """Takes in more of the answer's text; the events of that."""
        said: Parts = self._parts.add(text, final=why is not None)
        if said.reasoning:
            yield from self._text("reasoning", "reasoning_text", said.reasoning)
        if said.content:
            yield from self._text("message", "output_text", said.content)
        for call in said.calls:
            yield from self._call(call)
        if why is not None:
            self._why = why
            yield from self._close(completed=why != "length")

    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        made: dict[str, Any] = {"role": "assistant", "content": ""}
        for item in self._items:
            if item["type"] == "function_call":
                if item["status"] != "completed":  # cut off
                    continue
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                made.setdefault("tool_calls", []).append(call)
            elif item["type"] == "reasoning":
                made["reasoning_content"] = item["content"][0]["text"]
            else:
                made["content"] += item["content"][0]["text"]
        return made

    def response(self, answers: OpenAnswers) -> dict[str, Any]:
        """The whole of it, as far as it is written."""
        asked, chat, usage = self._asked, self._chat, answers.usage
        cut = self._why == "length"
        choice = asked.tool_choice
        form = None if asked.text is None else asked.text.format
        return {
            "id": self.ident,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if self._why is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "temperature": chat.temperature,
            "text": {
                "format": {"type": "text"}
                if form is None
                else form.model_dump(by_alias=True, exclude_none=True)
            },
            "tool_choice": (choice or "auto")
            if choice is None or isinstance(choice, str)
            else choice.model_dump(),
            "tools": [
                {"parameters": None, "strict": None, **tool.model_dump(exclude_none=True)}
                for tool in asked.tools or ()
            ],
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": None
            if self._why is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    **usage["prompt_tokens_details"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _text(self, kind: str, part: str, text: str) -> Iterator[dict[str, Any]]:
        """Some more of a message or of reasoning, in an item that is opened for it."""
        if not self._items or self._items[-1]["type"] != kind or self._is_closed():
            yield from self._close()
            item: dict[str, Any] = {"id": f"{kind[:3]}_{uuid.uuid4().hex}", "type": kind}
            if kind == "message":
                item |= {"role": "assistant"}
            else:
                item |= {"summary": []}
            self._items.append({**item, "status": "in_progress", "content": []})
            yield self._event("response.output_item.added", item=self._copy())
            self._items[-1]["content"].append(_part(part))
            yield self._event(
                "response.content_part.added", **self._place(), content_index=0, part=_part(part)
            )
        self._items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if part == "output_text" else {}
        yield self._event(
            f"response.{part}.delta", **self._place(), content_index=0, delta=text, **more
        )

    def _call(self, call: CallPart) -> Iterator[dict[str, Any]]:
        """Some more of a call, in an item that its first part opens."""
        if call.id:
            yield from self._close()
            named = {"call_id": call.id, "name": call.name, "arguments": ""}
            ident = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call"}
            self._items.append({**ident, **named, "status": "in_progress"})
            yield self._event("response.output_item.added", item=self._copy())
        item = self._items[-1]
        if call.arguments:
            item["arguments"] += call.arguments
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, **self._place(), delta=call.arguments)
        if call.ended:
            yield from self._close()

    def _close(self, completed: bool = True) -> Iterator[dict[str, Any]]:
        """Ends the item that is open."""
        if not self._items or self._is_closed():
            return
        item = self._items[-1]
        if item["type"] != "function_call":
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            place = {**self._place(), "content_index": 0}
            yield self._event(f"response.{part['type']}.done", **place, text=part["text"], **more)
            yield self._event("response.content_part.done", **place, part=part)
        elif completed:
            given = {name: item[name] for name in ("name", "arguments")}
            kind = "response.function_call_arguments.done"
            yield self._event(kind, **self._place(), **given)
        item["status"] = "completed" if completed else "incomplete"
        yield self._event("response.output_item.done", item=self._copy())

    def _is_closed(self) -> bool:
        return self._items[-1]["status"] != "in_progress"

    def _copy(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(json.dumps(self._items[-1]))
        return made

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        if "item" in fields:
            fields["output_index"] = len(self._items) - 1
        return {"type": kind, **fields}


def _part(kind: str) -> dict[str, Any]:
    """A part without any text yet."""
    if kind == "output_text":
        return {"type": kind, "text": "", "annotations": [], "logprobs": []}
    return {"type": kind, "text": ""}


async def _events(answers: OpenAnswers, written: _Written, ended: Any) -> AsyncIterator[bytes]:
    """Server-sent events with their names, numbered."""
    number = 0

    def sent(event: dict[str, Any]) -> bytes:
        nonlocal number
        text = json.dumps({**event, "sequence_number": number}, separators=(",", ":"))
        number += 1
        return f"event: {event['type']}\ndata: {text}\n\n".encode()

    try:
        for kind in ("response.created", "response.in_progress"):
            yield sent({"type": kind, "response": written.response(answers)})
        async with aclosing(answers.pieces()) as pieces:
            async for _, piece in pieces:
                for event in written.add(piece.text, finish_reason(piece)):
                    yield sent(event)
        ended()
        whole = written.response(answers)
        yield sent({"type": f"response.{whole['status']}", "response": whole})
    except ApiError as error:  # the status is out already
        found = error_content(error.status_code, str(error.detail), error.code)["error"]
        fields = {name: found[name] for name in ("code", "message", "param")}
        yield sent({"type": "error", **fields})
