"""From what a request says to the tokens that the model reads.

Tokenizing a long prompt takes a while, so a thread does it, one prompt at a time: the event loop
goes on meanwhile, and a tokenizer is never used twice at once here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lorakit.inference.engine import Engine
from lorakit.inference.sampling import prompt_tokens
from lorakit.inference.server.errors import bad_field
from lorakit.inference.server.payloads import ChatRequest


class Prompts:
    """Prompts for one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "lorakit-prompts")

    async def of_chat(self, adapter: str | None, asked: ChatRequest) -> list[int]:
        """The conversation in the template of the adapter, up to where the answer begins.

        Raises:
            InputError: the template refuses it.
        """
        messages = [message.for_template() for message in asked.messages]
        tools = asked.shown_tools()
        tokenizer = self._engine.tokenizer_of(adapter)
        work = partial(prompt_tokens, messages, tokenizer, tools)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def of_texts(
        self, adapter: str | None, prompts: Sequence[str | list[int]]
    ) -> list[list[int]]:
        """Each prompt's tokens; texts get the special tokens that the tokenizer adds.

        Raises:
            ApiError: 400, a token id is none of the model's.
        """
        tokenizer = self._engine.tokenizer_of(adapter)
        size = len(tokenizer)

        def tokens() -> list[list[int]]:
            made = []
            for prompt in prompts:
                if isinstance(prompt, str):
                    prompt = list(tokenizer(prompt, verbose=False)["input_ids"])
                elif (highest := max(prompt)) >= size:
                    raise bad_field(f"prompt: {highest} is no token; there are {size}", "prompt")
                made.append(prompt)
            return made

        return await asyncio.get_running_loop().run_in_executor(self._thread, tokens)
