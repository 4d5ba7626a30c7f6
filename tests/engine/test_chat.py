"""The chat: answers that stream, a history that fits, commands, interruptions and pipes."""

import io
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from answered import generate_answers
from lorakit.adapters.open import open_adapter
from lorakit.engine.conversation import HELP, ChatSession, run
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling, prompt_tokens
from lorakit.errors import InputError, LorakitError
from served import until

SHORT = Sampling(max_new_tokens=8)
Start = Callable[..., Engine]


@pytest.fixture
def engine(start: Start) -> Engine:
    return start(max_rows=1)


def said(session: ChatSession, text: str) -> str:
    return "".join(session.answer(text))


def counted(engine: Engine, each: Callable[[int], object] = lambda _: None) -> list[None]:
    """Grows with every pass of the model, which asks for the positions' angles once."""
    calls: list[None] = []

    def count(*_: Any) -> None:
        calls.append(None)
        each(len(calls))

    engine._model.model.rotary_emb.register_forward_hook(count)
    return calls


def transcript(session: ChatSession, *lines: str) -> str:
    written: list[str] = []
    run(session, lines, written.append)
    return "".join(written)


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    return ChatSession(engine, "shop", SHORT)


def test_a_streamed_answer_is_the_greedy_one(
    session: ChatSession, adapters: dict[str, Path]
) -> None:
    opened = open_adapter(adapters["shop"], dtype="float32")
    wanted = [{"role": "user", "content": "hello"}]
    assert generate_answers(opened.model, opened.tokenizer, [wanted], max_new_tokens=8) == [
        said(session, "hello")
    ]


def test_an_answer_sees_the_system_message_and_what_was_said_before(
    engine: Engine, adapters: dict[str, Path]
) -> None:
    session = ChatSession(engine, "poet", SHORT, system="be brief")
    first = said(session, "one")
    second = said(session, "two")
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    opened = open_adapter(adapters["poet"], dtype="float32")
    assert second == "".join(
        generate_answers(opened.model, opened.tokenizer, [conversation], max_new_tokens=8)
    )
    session.command("/reset")
    assert said(session, "one") == first


def test_adapters_are_chosen_by_name_and_the_base_answers_without_any(
    session: ChatSession, engine: Engine
) -> None:
    def fresh() -> str:
        session.reset()
        return said(session, "hello")

    shop = fresh()
    assert session.command("/adapter poet") == "the adapter 'poet' answers now"
    poet = fresh()
    assert "the base answers now, without the adapter" in str(session.command("/base"))
    base = fresh()
    assert "'poet' answers now" in str(session.command("/base"))
    assert fresh() == poet
    assert session.command("/adapter shop") == "the adapter 'shop' answers now"
    assert fresh() == shop
    assert len({shop, poet, base}) == 3
    assert said(ChatSession(engine, None, SHORT), "hello") == base


def test_an_adapters_folder_is_loaded_once_under_its_name(
    session: ChatSession, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["poet"], tmp_path / "other.v2"))
    for _ in range(2):
        assert session.command(f"/adapter {folder}") == "the adapter 'other.v2' answers now"
    assert session.adapters == [*adapters, "other.v2"]
    before = said(session, "hello")
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    assert "damaged" in str(session.command(f"/adapter {damaged}"))
    session.reset()
    assert said(session, "hello") == before


def test_an_unknown_command_or_adapter_is_told_with_the_nearest(session: ChatSession) -> None:
    assert session.command("/rest") == (
        "there is no command /rest (did you mean '/reset'?); /help shows them"
    )
    assert "did you mean 'poet'" in str(session.command("/adapter poe"))
    assert session.command("/adapter") == (
        "the adapter 'shop' answers now; there are: shop, poet, few, mixed"
    )
    assert session.command("/help") == HELP


def test_without_an_adapter_the_base_answers_and_one_can_be_loaded(
    start: Start, adapters: dict[str, Path]
) -> None:
    session = ChatSession(start(adapters={}), None, SHORT)
    assert "there is no adapter" in str(session.command("/base"))
    assert "there is no adapter" in str(session.command("/adapter"))
    assert "no model 'shop'" in str(session.command("/adapter shop"))
    base = said(session, "hello")
    assert session.command(f"/adapter {adapters['shop']}") == "the adapter 'shop' answers now"
    session.reset()
    assert said(session, "hello") != base


def test_an_adapter_that_is_merged_into_the_base_says_why_there_is_no_other(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine = open_engine(None, {"shop": adapters["shop"]}, dtype="float32", merged=True)
    with closing(engine):
        session = ChatSession(engine, None, SHORT)
        for command in ("/base", "/adapter", f"/adapter {adapters['poet']}"):
            assert "shop is merged into the model" in str(session.command(command))
        merged = said(session, "hello")
    with closing(open_engine(None, {"shop": adapters["shop"]}, dtype="float32")) as engine:
        assert said(ChatSession(engine, "shop", SHORT), "hello") == merged


def test_old_turns_are_dropped_with_a_notice_when_the_context_is_full(
    session: ChatSession,
) -> None:
    for turn in ("a", "b", "c"):
        said(session, turn * 100)
    assert session.notices == []
    # Long enough that it does not matter how many bytes the random answers before it have.
    said(session, "d" * 250)
    assert session.notices == ["dropped the 2 oldest turns: the model reads at most 512 tokens"]
    questions = [m["content"][0] for m in session.history if m["role"] == "user"]
    assert questions == ["c", "d"]
    assert transcript(session, "e" * 300).startswith("(dropped ")


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(
    session: ChatSession,
) -> None:
    with pytest.raises(InputError, match="the model reads at most 512: shorten it"):
        session.answer("x" * 600)
    shown = transcript(session, "x" * 600, "hello")
    assert shown.count("shorten it") == 1
    assert [m["content"] for m in session.history if m["role"] == "user"] == ["hello"]


def test_an_answer_never_runs_past_the_context(engine: Engine) -> None:
    session = ChatSession(engine, None, Sampling(max_new_tokens=10_000))
    question = {"role": "user", "content": "x" * 400}
    prompt = len(prompt_tokens([question], engine.tokenizer))
    calls = counted(engine)
    said(session, "x" * 400)
    assert 0 < len(calls) <= 512 - prompt


def test_closing_an_answer_stops_the_model_and_keeps_what_was_said(engine: Engine) -> None:
    session = ChatSession(engine, "shop", Sampling(max_new_tokens=400))
    calls = counted(engine)
    with closing(session.answer("hello")) as pieces:
        first = next(pieces)
    assert session.history[-1] == {"role": "assistant", "content": first}
    until(lambda: engine.running() == 0)
    assert len(calls) < 400


def test_ctrl_c_stops_the_answer_and_not_the_chat(engine: Engine) -> None:
    session = ChatSession(engine, "shop", Sampling(max_new_tokens=400))
    main = threading.main_thread().ident
    calls = counted(
        engine, lambda times: times == 5 and signal.pthread_kill(main or 0, signal.SIGINT)
    )
    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        shown = transcript(session, "hello", "/adapter")
    finally:
        signal.signal(signal.SIGINT, before)
    assert " (stopped)\n" in shown
    assert "the adapter 'shop' answers now; there are: shop, poet" in shown
    assert len(calls) < 400


def test_ctrl_c_between_answers_ends_the_chat(session: ChatSession) -> None:
    def lines() -> Any:
        yield "/help"
        raise KeyboardInterrupt

    written: list[str] = []
    run(session, lines(), written.append)
    assert written == [f"{HELP}\n", "\n"]


@pytest.mark.parametrize("use_base", [True, False])
def test_what_fails_in_the_model_is_raised_to_the_caller(
    session: ChatSession, engine: Engine, use_base: bool
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    session.use_base = use_base
    hook = engine._model.register_forward_hook(fail)
    with pytest.raises(LorakitError, match=r"failed while answering: out of memory$"):
        said(session, "hello")
    assert session.history == []
    hook.remove()
    assert said(session, "hello")


def test_a_pipe_is_answered_line_by_line_without_a_prompt(session: ChatSession) -> None:
    written: list[str] = []
    run(session, io.StringIO("hello\n\n  \nagain"), written.append)
    answers = [m["content"] for m in session.history if m["role"] == "assistant"]
    assert "".join(written) == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 2


def test_quit_ends_the_chat_before_the_lines_do(session: ChatSession) -> None:
    assert transcript(session, "/quit", "hello") == ""
    assert session.history == []


def test_a_seed_repeats_a_sampled_conversation(engine: Engine) -> None:
    def talk(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=8, seed=seed)
        session = ChatSession(engine, "shop", sampling)
        first = [said(session, "hello"), said(session, "again")]
        session.reset()
        assert [said(session, "hello"), said(session, "again")] == first
        return first

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)
