"""`POST /tokenize` and `POST /detokenize`, in vLLM's forms."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request
from pydantic import Field, model_validator

from lorakit.server.bodies import client_of
from lorakit.server.errors import bad_field
from lorakit.server.event_streams import while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.messages import ChatMessage, Tool
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import Items, Payload, Text, TokenId
from lorakit.server.payloads import ChatRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import Detokenized, Tokens


class TokenizeRequest(Payload):
    """A text, or a conversation in the model's chat template."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    prompt: Text | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Of a text, by default true; a chat template writes its own."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Items[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of the two")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with prompt: a template writes its own")
        if self.continue_final_message and (self.messages is None or self.add_generation_prompt):
            raise ValueError("continue_final_message goes with messages alone")
        return self


class DetokenizeRequest(Payload):
    """Tokens."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


async def tokenize(
    request: Request, asked: TokenizeRequest, desk: Desk, prompts: Prompts
) -> Tokens:
    """The tokens that the model reads.

    Raises:
        ApiError, InputError: there is no such model, or the text is too long for it.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    tokenizer, client = desk.engine.tokenizer_of(adapter), client_of(request)
    deadline, late = desk.deadline(), desk.late()
    if asked.messages is not None:
        size = len(await request.body())
        chat = ChatRequest.model_construct(
            model=asked.model,
            messages=asked.messages,
            tools=asked.tools,
            chat_template_kwargs=asked.chat_template_kwargs,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
        )
        shown = prompts.of_chat(adapter, chat, client, size)
        row, _ = await while_wanted(request, shown, deadline, late)
        tokens = row.input_ids
    else:
        special, text = asked.add_special_tokens is not False, asked.prompt or ""
        work = prompts.of_texts(adapter, [text], client, special=special)
        [tokens] = await while_wanted(request, work, deadline, late)
    names = None
    if asked.return_token_strs:
        names = [str(name) for name in tokenizer.convert_ids_to_tokens(tokens)]
    return {
        "count": len(tokens),
        "max_model_len": desk.engine.context_length,
        "tokens": tokens,
        "token_strs": names,
    }


async def detokenize(request: Request, asked: DetokenizeRequest, desk: Desk) -> Detokenized:
    """The text of tokens.

    Raises:
        ApiError: there is no such model, or no such token.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    tokenizer = desk.engine.tokenizer_of(adapter)
    if (highest := max(asked.tokens, default=0)) >= len(tokenizer):
        raise bad_field(f"tokens: {highest} is no token; there are {len(tokenizer)}", "tokens")
    return {"prompt": str(tokenizer.decode(asked.tokens))}
