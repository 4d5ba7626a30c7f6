"""The served models, and adapters that come and go while the server runs, as vLLM has it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from lorakit.engine.adapter_names import check_name, composed
from lorakit.engine.engine import Engine
from lorakit.engine.pool import UnknownModelError
from lorakit.errors import InputError
from lorakit.models.picture_reader import reader_of
from lorakit.server.errors import ApiError, bad_field, no_model
from lorakit.server.keys import Caller
from lorakit.server.payloads import LoadAdapterRequest, UnloadAdapterRequest
from lorakit.server.replies import ModelCard, ModelList


class Shelf:
    """The models of one engine.

    Args:
        root: the folder that adapters are loaded from; None forbids it.
        images: whether requests may have pictures, where the model reads some.
    """

    def __init__(self, engine: Engine, root: Path | None, images: bool = True) -> None:
        self._engine = engine
        self._pictures = images and reader_of(engine.tokenizer) is not None
        self._root = None if root is None else root.absolute()
        self._started = int(time.time())
        self._loaded: dict[str, int] = {}
        self._one_at_a_time = asyncio.Lock()

    def models(self, caller: Caller) -> ModelList:
        """The base, then each adapter with the base as its parent: everyone's and the caller's."""
        base = self._engine.model_name
        cards = [self._card(base, base, None, self._started)]
        for info in self._engine.pool.infos():
            if not caller.sees(info.owner):
                continue
            created = self._loaded.get(info.name, self._started)
            card = self._card(info.name, str(info.folder), base, created)
            if info.notice:
                card["notice"] = info.notice
            cards.append(card)
        return {"object": "list", "data": cards}

    def model(self, name: str, caller: Caller) -> ModelCard:
        """The model of this name, if the caller may use it.

        Raises:
            ApiError: 404, there is none.
        """
        name = adapter_named(self._engine, name, caller) or self._engine.model_name
        return next(card for card in self.models(caller)["data"] if card["id"] == name)

    async def load(self, asked: LoadAdapterRequest) -> str:
        """Loads an adapter, or a new version of one, and says so.

        Raises:
            ApiError: 400, the adapter cannot be served, or its place is not below the root.
        """
        name = composed(asked.lora_name)
        if self._root is None:
            raise ApiError(
                403, "adapters are not loaded here: start lorakit serve with --adapter-root FOLDER"
            )
        try:
            check_name(name)
        except InputError as error:
            raise bad_field(str(error), "lora_name") from error
        async with self._one_at_a_time:
            if name == self._engine.model_name:
                raise bad_field(f"'{name}' is the base model's name", "lora_name")
            there = any(info.name == name for info in self._engine.pool.infos())
            if there and not asked.load_inplace:
                raise bad_field(
                    f"the adapter '{name}' is loaded already: unload it first, or give "
                    "load_inplace: true to replace it",
                    "lora_name",
                )
            try:
                # In a thread, as reading takes a while; what is being answered goes on.
                info = await asyncio.to_thread(
                    self._engine.pool.register, name, Path(asked.lora_path), self._root
                )
            except InputError as error:
                raise bad_field(str(error), "lora_path") from error
            self._loaded[name] = int(time.time())
        done = f"Success: LoRA adapter '{name}' {'replaced' if there else 'added'} successfully."
        return f"{done} Note: {info.notice}" if info.notice else done

    async def unload(self, asked: UnloadAdapterRequest) -> str:
        """Forgets an adapter, whose running answers finish, and says so.

        Raises:
            ApiError: 404, there is none of this name.
        """
        name = composed(asked.lora_name)
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(self._engine.pool.unregister, name)
            except InputError as error:
                raise ApiError(
                    404,
                    f"there is no adapter '{name}' to unload",
                    code="model_not_found",
                    param="lora_name",
                ) from error
            self._loaded.pop(name, None)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _card(self, name: str, root: str, parent: str | None, created: int) -> ModelCard:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "lorakit",
            "root": root,
            "parent": parent,
            "max_model_len": self._engine.context_length,
            "input_modalities": ["text", "image"] if self._pictures else ["text"],
        }


def adapter_named(engine: Engine, model: str, caller: Caller | None = None) -> str | None:
    """The adapter that a request means by `model`; None for the base.

    Args:
        caller: who asks; None where that has been checked before.

    Raises:
        ApiError: 404, it is neither, or another's.
    """
    if model == engine.model_name:
        return None
    name = composed(model)
    try:
        info = engine.pool.version(name).info
        if caller is not None and not caller.sees(info.owner):
            raise UnknownModelError(f"there is no model {name!r}")
    except UnknownModelError as error:
        raise no_model(error) from error
    return name
