"""The chat: answers that stream, a history that fits, commands, interruptions and pipes."""

import io
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import InputError, LorakitError
from lorakit.evaluation.answers import generate_answers
from lorakit.inference.chat import HELP, ChatSession, Sampling, run
from lorakit.inference.sampling import prompt_tokens
from lorakit.inference.streaming import _Streamer
from lorakit.lora import LoraModel

SHORT = Sampling(max_new_tokens=8)


def said(session: ChatSession, text: str) -> str:
    return "".join(session.answer(text))


def transcript(session: ChatSession, *lines: str) -> str:
    written: list[str] = []
    run(session, lines, written.append)
    return "".join(written)


@pytest.fixture
def session(model: LoraModel, tokenizer: Any) -> ChatSession:
    return ChatSession(model, tokenizer, SHORT)


def test_a_streamed_answer_is_the_greedy_one(session: ChatSession, tokenizer: Any) -> None:
    wanted = [{"role": "user", "content": "hello"}]
    whole = generate_answers(session.model, tokenizer, [wanted], max_new_tokens=8)[0]
    assert said(session, "hello") == whole


def test_an_answer_sees_the_system_message_and_what_was_said_before(
    model: LoraModel, tokenizer: Any
) -> None:
    session = ChatSession(model, tokenizer, SHORT, system="be brief")
    first = said(session, "one")
    second = said(session, "two")
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    assert generate_answers(model, tokenizer, [conversation], max_new_tokens=8) == [second]
    session.command("/reset")
    assert said(session, "one") == first


def test_adapters_are_chosen_by_name_and_the_base_answers_without_any(
    session: ChatSession, plain: Any, tokenizer: Any
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
    bare = ChatSession(session.model.unload(), tokenizer, SHORT)
    assert said(bare, "hello") == base


def test_an_adapters_folder_is_loaded_once_under_its_name(
    session: ChatSession, tmp_path: Path
) -> None:
    session.model.save_pretrained(tmp_path, ["poet"])
    poet = tmp_path / "poet"
    poet.rename(tmp_path / "other.v2")
    for _ in range(2):
        reply = session.command(f"/adapter {tmp_path / 'other.v2'}")
        assert reply == "the adapter 'other-v2' answers now"
    assert session.adapters == ["shop", "poet", "other-v2"]


def test_an_unknown_command_or_adapter_is_told_with_the_nearest(session: ChatSession) -> None:
    assert session.command("/rest") == (
        "there is no command /rest (did you mean '/reset'?); /help shows them"
    )
    assert "did you mean 'poet'" in str(session.command("/adapter poe"))
    assert session.command("/adapter") == "the adapter 'shop' answers now; there are: shop, poet"
    assert session.command("/help") == HELP


def test_a_plain_model_says_that_it_has_no_adapter(plain: Any, tokenizer: Any) -> None:
    session = ChatSession(plain, tokenizer, SHORT)
    assert "no adapter" in str(session.command("/base"))
    assert "no adapter" in str(session.command("/adapter shop"))
    assert said(session, "hello")


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


def test_an_answer_never_runs_past_the_context(plain: Any, tokenizer: Any) -> None:
    session = ChatSession(plain, tokenizer, Sampling(max_new_tokens=10_000))
    prompt = len(prompt_tokens([{"role": "user", "content": "x" * 400}], tokenizer))
    tokens = 0

    def count(*_: Any) -> None:
        nonlocal tokens
        tokens += 1

    plain.register_forward_hook(count)
    said(session, "x" * 400)
    assert 0 < tokens <= 512 - prompt


def test_text_without_spaces_streams_and_characters_stay_whole(tokenizer: Any) -> None:
    text = '{"city":"Malmö","item":"茶杯"}'
    streamer = _Streamer(tokenizer)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()
    pieces = [streamer.pieces.get() for _ in range(streamer.pieces.qsize())]
    assert pieces == list(text)  # a token a byte: so a piece a character


def test_closing_an_answer_stops_the_model_and_keeps_what_was_said(
    model: LoraModel, tokenizer: Any
) -> None:
    session = ChatSession(model, tokenizer, Sampling(max_new_tokens=250))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.get_base_model().register_forward_hook(count)
    with closing(session.answer("hello")) as pieces:
        first = next(pieces)
    assert session.history[-1] == {"role": "assistant", "content": first}
    assert calls < 250
    assert not any(t.name == "lorakit-generate" for t in threading.enumerate())


def test_ctrl_c_stops_the_answer_and_not_the_chat(model: LoraModel, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer, Sampling(max_new_tokens=250))
    main = threading.main_thread().ident
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.pthread_kill(main or 0, signal.SIGINT)

    model.get_base_model().register_forward_hook(interrupt)
    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        shown = transcript(session, "hello", "/adapter")
    finally:
        signal.signal(signal.SIGINT, before)
    assert " (stopped)\n" in shown
    assert shown.endswith("the adapter 'shop' answers now; there are: shop, poet\n")
    assert calls < 250


def test_ctrl_c_between_answers_ends_the_chat(session: ChatSession) -> None:
    def lines() -> Any:
        yield "/help"
        raise KeyboardInterrupt

    written: list[str] = []
    run(session, lines(), written.append)
    assert written == [f"{HELP}\n", "\n"]


@pytest.mark.parametrize("use_base", [True, False])
def test_what_fails_in_the_model_is_raised_to_the_caller(
    session: ChatSession, use_base: bool
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    session.use_base = use_base
    hook = session.model.get_base_model().register_forward_hook(fail)
    with pytest.raises(LorakitError, match=r"failed while answering: out of memory$"):
        said(session, "hello")
    assert session.history == []
    hook.remove()
    assert said(session, "hello")
    assert session.model.active_adapter == "shop"


def test_a_pipe_is_answered_line_by_line_without_a_prompt(session: ChatSession) -> None:
    written: list[str] = []
    run(session, io.StringIO("hello\n\n  \nagain"), written.append)
    answers = [m["content"] for m in session.history if m["role"] == "assistant"]
    assert "".join(written) == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 2


def test_quit_ends_the_chat_before_the_lines_do(session: ChatSession) -> None:
    assert transcript(session, "/quit", "hello") == ""
    assert session.history == []


def test_a_seed_repeats_a_sampled_conversation(model: LoraModel, tokenizer: Any) -> None:
    def talk(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=8, seed=seed)
        session = ChatSession(model, tokenizer, sampling)
        first = [said(session, "hello"), said(session, "again")]
        session.reset()
        assert [said(session, "hello"), said(session, "again")] == first
        return first

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Sampling(**wrong)
