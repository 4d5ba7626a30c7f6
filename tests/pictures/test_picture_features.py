"""Features of pictures: computed once for all that show them, and the same answers as without."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import LoraConfig, get_peft_model
from lorakit.data.conversations import IMAGE
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.pictures_apart import tells_pictures_apart
from lorakit.engine.sampling import Sampling
from lorakit.engine.shown import shown_text
from lorakit.models.load import load_for_task
from matrix import few
from tiny_pictures import save_pictures, save_tiny

PARTS = {"says": "language", "sees": "language,projector", "looks": "vision"}
BASES = ["Idefics 3, SmolVLM", "Qwen2.5-VL"]


@contextmanager
def engine_of(folder: Path, **options: Any) -> Iterator[Engine]:
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu")
    engine = Engine(loaded.model, loaded.tokenizer, "base", max_rows=4, **options)
    try:
        for name in PARTS:
            engine.pool.register(name, folder / name)
        yield engine
    finally:
        engine.close()


def answers(engine: Engine, asked: list[tuple[str | None, tuple[str, ...]]]) -> list[list[Any]]:
    """The tokens and their log-probabilities, of each adapter and pictures."""
    tickets = []
    for name, pictures in asked:
        parts = [{"type": IMAGE, IMAGE: one} for one in pictures]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}]
        tokenizer = engine.tokenizer_of(name)
        row = prompt_row(shown_text(messages, tokenizer), messages, tokenizer)
        sampling = Sampling(max_new_tokens=4, logprobs=0)
        tickets.append(engine.submit(row.input_ids, name, sampling, row.pictures))
    found = []
    for ticket in tickets:
        pieces = list(ticket)
        assert not pieces[-1].error, pieces[-1].error
        found.append([(t.token, t.logprob) for piece in pieces for t in piece.logprobs])
    return found


def counted(engine: Engine, folder: Path) -> list[int]:
    """How many times the vision part computes something, from now on."""
    vision = engine.resident.base.model
    vision = getattr(vision, "vision_model", None) or vision.visual
    inner = getattr(vision, "encoder", None) or vision.patch_embed
    calls: list[int] = []
    # Whether the cache carries a model that tells pictures apart is tried with the first of them.
    asked = [(None, (str(folder / "shown" / "grey-1.png"),))]
    if tells_pictures_apart(engine.resident.base):
        answers(engine, asked)
        assert engine._answers.features is not None
        engine._answers.features.kept.clear()
    inner.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="module", params=few(BASES, BASES[0]))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    save_tiny(request.param, folder / "base")
    save_pictures(folder / "shown", 2)
    for seed, (name, parts) in enumerate(PARTS.items()):
        torch.manual_seed(seed)
        model = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu").model
        config = LoraConfig(r=4, target_modules=f"all-linear[{parts}]", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / name)
    return folder


def test_a_picture_is_computed_once_and_answers_are_those_without_keeping_it(folder: Path) -> None:
    red, blue = (str(folder / "shown" / f"{name}.png") for name in ("red-0", "blue-1"))
    shown = [(red,), (blue,), (red, blue)]
    asked = [(name, one) for name in (None, *PARTS) for one in shown] * 2
    with engine_of(folder, feature_bytes=0) as engine:
        wanted = answers(engine, asked)
    with engine_of(folder) as engine:
        calls = counted(engine, folder)
        found = answers(engine, asked)
        first = len(calls)
        again = answers(engine, asked)
        assert len(calls) == first
    for one, other, third in zip(wanted, found, again, strict=True):
        assert [t for t, _ in one] == [t for t, _ in other] == [t for t, _ in third]
        for (_, p), (_, q), (_, r) in zip(one, other, third, strict=True):
            assert p == pytest.approx(q, abs=1e-5)
            assert p == pytest.approx(r, abs=1e-5)
    different = {json.dumps([t for t, _ in one]) for one in wanted}
    assert len(different) > 3  # the adapters and pictures do make answers differ
    # Once for all that leave the vision part alone, once for the adapter that changes it. Qwen's
    # projector stands in its vision part, which is then computed for its adapter anew.
    inside = hasattr(load_base(folder).model, "visual")
    assert first == 2 * (3 if inside else 2)


def load_base(folder: Path) -> Any:
    return load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu").model


def test_an_adapter_of_the_same_name_sees_with_its_own_projector(folder: Path) -> None:
    asked: Any = [("sees", (str(folder / "shown" / "red-0.png"),))]
    with engine_of(folder) as engine:
        before = answers(engine, asked)
        engine.pool.register("sees", folder / "looks")
        found = answers(engine, asked)
        assert found == answers(engine, [("looks", asked[0][1])])
    assert found != before


def test_what_is_kept_is_bounded(folder: Path) -> None:
    pictures = [str(file) for file in sorted((folder / "shown").iterdir())]
    with engine_of(folder) as engine:
        answers(engine, [(None, (pictures[0],))])
        features = engine._answers.features
        assert features is not None
        most = features.kept.bytes * 2
    with engine_of(folder, feature_bytes=most) as engine:
        calls, features = counted(engine, folder), engine._answers.features
        assert features is not None
        for one in pictures:
            answers(engine, [(None, (one,))])
            assert features.kept.bytes <= most
        assert len(calls) == len(pictures)
        answers(engine, [(None, (pictures[-1],))])
        assert len(calls) == len(pictures)
        answers(engine, [(None, (pictures[0],))])  # dropped
        assert len(calls) == len(pictures) + 1
