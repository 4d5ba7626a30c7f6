"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from lorakit.engine.requests import AnswerPiece, ChosenToken, TokenLogprob
from lorakit.server.bodies import client_of
from lorakit.server.event_streams import Kind, respond, while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.message_parts import MessageParts
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import ChatRequest
from lorakit.server.prompt_logprobs import prompt_logprobs
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    FinishReason,
    Rival,
    finite,
)
from lorakit.server.tool_choice import check_choice

_KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


async def chat(request: Request, asked: ChatRequest, desk: Desk, prompts: Prompts) -> Response:
    """Answers a conversation.

    Raises:
        ApiError, InputError: it cannot be.
    """
    caller = caller_of(request)
    adapter = await desk.adapter(asked.model, caller)
    desk.require_kind(adapter, asked)
    deadline = desk.deadline()
    desk.require_room(asked.choices)
    check_choice(asked)
    size = len(await request.body())
    work = prompts.of_chat(adapter, asked, client_of(request), size)
    prompt, reads = await while_wanted(request, work, deadline, desk.late())
    more: dict[str, Any] = {}
    if (rivals := asked.prompt_logprobs) is not None:
        scored = prompt_logprobs(desk.engine, prompt.input_ids, adapter, rivals, caller.owner)
        found = await while_wanted(request, scored, deadline, desk.late())
        more["prompt_logprobs"] = found
    given = [prompt.input_ids], adapter, asked, deadline, prompt.pictures
    answers = await desk.hand_in(*given, owner=caller.owner)
    tools, most = asked.shown_tools(), 1 if asked.parallel_tool_calls is False else None
    special = asked.skip_special_tokens is False
    parts = [MessageParts(reads, tools, most, special=special) for _ in range(len(answers))]

    def logprobs(tokens: Iterable[ChosenToken]) -> ChatLogprobs | None:
        return None if asked.rivals is None else _logprobs(tokens)

    def ended(number: int, why: FinishReason) -> FinishReason:
        # OpenAI has "stop" where the client itself has named the function.
        called = parts[number].called and asked.called is None
        return "tool_calls" if called and why == "stop" else why

    def whole(number: int, answer: Answer) -> ChatChoice:
        said = parts[number].add(answer.text, final=True)
        message: AnswerMessage = {
            "role": "assistant",
            "content": said.content or (None if said.calls else ""),
            "refusal": None,
        }
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [call.whole for call in said.calls]
        return {
            "index": number,
            "message": message,
            "logprobs": logprobs(answer.logprobs),
            "finish_reason": ended(number, answer.finish_reason),
        }

    def pieces_of(number: int, piece: AnswerPiece) -> Iterator[ChatChunkChoice]:
        why = finish_reason(piece)
        said = parts[number].add(piece.text, final=why is not None)
        delta: Delta = {}
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.content or (piece.logprobs and not said):
            delta["content"] = said.content
        if said.calls:
            delta["tool_calls"] = [call.delta for call in said.calls]
        made: ChatChunkChoice = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs(piece.logprobs),
            "finish_reason": None if why is None else ended(number, why),
        }
        if said.calls and why is not None:  # as OpenAI does, the reason comes behind the calls
            yield {**made, "finish_reason": None}
            made = {**made, "delta": {}, "logprobs": None}
        if delta or why is not None:
            yield made

    return await respond(request, asked, answers, _KIND, whole, pieces_of, _role, more=more)


def _role(number: int) -> ChatChunkChoice:
    return {
        "index": number,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _logprobs(tokens: Iterable[ChosenToken]) -> ChatLogprobs:
    content = [{**_rival(t), "top_logprobs": [_rival(r) for r in t.top]} for t in tokens]
    return {"content": content, "refusal": None}  # type: ignore[typeddict-item]


def _rival(token: TokenLogprob) -> Rival:
    # A token may hold a part of a character, which then reads as U+FFFD: its bytes are not known.
    own = None if "\ufffd" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": finite(token.logprob), "bytes": own}
