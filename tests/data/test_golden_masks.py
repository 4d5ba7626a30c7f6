"""What is learned of the same conversations under every family's template.

`templates/*.golden.txt` hold the rendered conversations with the learned tokens between ⟦ and ⟧.
After a wanted change: LORAKIT_WRITE_GOLDEN=1 pytest tests/data/test_golden_masks.py, and read
the difference.
"""

import copy
import json
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from chat_families import FAMILIES, FOLDER, family_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.conversations import Message
from lorakit.data.masking import IGNORE, TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.data.spans import find_answers
from lorakit.data.templates import render
from lorakit.errors import InputError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def calling(*arguments: dict[str, Any], content: str = "", **more: Any) -> Message:
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": a}} for a in arguments
    ]
    return assistant(content, tool_calls=calls, **more)


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def result(content: str) -> Message:
    return {"role": "tool", "content": content}


TWO_TURNS = [user("Hi"), assistant("Hello."), user("And you?"), assistant("Fine.")]
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [user("Hi"), assistant("Hello.")],
    "system and two turns": [system("Be kind."), *TWO_TURNS],
    "empty system and two turns": [system(""), *TWO_TURNS],
    "call, result, answer": [
        *(user("Rain in Paris?"), calling({"city": "Paris", "days": 2})),
        *(result('{"rain": "no"}'), assistant("No rain.")),
    ],
    "two rounds of calls": [
        *(system("Be brief."), user("Paris?"), calling({"city": "Paris"}), result("sun")),
        *(assistant("Sun."), user("Rome?"), calling({"city": "Rome"}), result("rain")),
        assistant("Rain."),
    ],
    "two calls at once, with a word before": [
        *(user("Both?"), calling({"city": "Paris"}, {"city": "Rome"}, content="I look.")),
        *(result("sun"), result("rain"), assistant("Sun, rain.")),
    ],
    "a call without arguments ends the row": [user("Now?"), calling({})],
    "reasoning of its own": [
        *(user("2+2?"), assistant("4", reasoning_content="two and two")),
        *(user("3+3?"), assistant("6", reasoning_content="three twice")),
    ],
    "reasoning before a call": [
        *(user("Rain?"), calling({"city": "Rome"}, reasoning_content="I must look")),
        *(result("rain"), assistant("Yes.", reasoning_content="it says rain")),
    ],
    "reasoning in the answer": [
        *(user("2+2?"), assistant("<think>two and two</think>4")),
        *(user("3+3?"), assistant("<think>three twice</think>6")),
    ],
    "Chinese and emoji": [
        *(user("你好，你是谁？👋🏽"), assistant("我是助手。👩‍👩‍👧 很高兴！")),
        *(user("谢谢"), assistant("不客气 🙏")),
    ],
    "whitespace around answers": [
        *(user("a "), assistant("  two spaces")),
        *(user("b\n"), assistant("\n\ntwo lines\n")),
    ],
    "an answer like its question": [
        user("same"),
        assistant("same"),
        user("same"),
        assistant("same"),
    ],
}


def row_of(messages: list[Message], family: str, max_length: int = 100_000) -> TokenizedRow:
    tools = (WEATHER,) if any("tool_calls" in message for message in messages) else ()
    sample = Sample(tuple(messages), None, "rows.jsonl:1", tools)
    return tokenize(sample, family_tokenizer(family), max_length)


def runs(row: TokenizedRow, tokenizer: Any) -> list[tuple[bool, str]]:
    """The text of each unbroken run of tokens that are learned, or are not."""
    grouped: list[tuple[bool, list[int]]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if not grouped or grouped[-1][0] != (label != IGNORE):
            grouped.append((label != IGNORE, []))
        grouped[-1][1].append(token)
    return [(learned, tokenizer.decode(ids)) for learned, ids in grouped]


def learned(row: TokenizedRow, family: str) -> list[str]:
    return [text for is_learned, text in runs(row, family_tokenizer(family)) if is_learned]


def golden(family: str) -> str:
    cases = []
    for case, messages in CONVERSATIONS.items():
        try:
            row = row_of(messages, family)
        except InputError as error:
            shown = f"refused: {error}"
        else:
            parts = runs(row, family_tokenizer(family))
            shown = "".join(f"⟦{text}⟧" if is_learned else text for is_learned, text in parts)
            if row.unshown:
                shown += f"\n(not shown: {', '.join(row.unshown)})"
        cases.append(f"──── {case} ────\n{shown}\n")
    return "\n".join(cases)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_golden_masks_are_kept(family: str) -> None:
    path = FOLDER / f"{family}.golden.txt"
    if os.environ.get("LORAKIT_WRITE_GOLDEN"):
        path.write_text(golden(family), encoding="utf-8", newline="\n")
    assert golden(family) == path.read_text(encoding="utf-8")


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(str.strip)


def contents(family: str) -> st.SearchStrategy[str]:
    """Text without whitespace at its ends, sometimes with one of the family's own tokens in it."""
    tokens = st.sampled_from(["", *FAMILIES[family].special])
    return st.builds("{}{} {}".format, CONTENT, tokens, CONTENT).map(str.strip).filter(bool)


def conversations(family: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    pairs = st.tuples(contents(family), contents(family))
    return st.lists(pairs, min_size=1, max_size=3)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_in_any_conversation_the_answers_are_learned_and_nothing_else(
    family: str, data: st.DataObject
) -> None:
    turns = data.draw(conversations(family))
    tokenizer = family_tokenizer(family)
    messages = [m for asked, said in turns for m in (user(asked), assistant(said))]
    row = row_of(messages, family)
    expected = [
        FAMILIES[family].learned(said, i == len(turns) - 1) for i, (_, said) in enumerate(turns)
    ]
    assert learned(row, family) == [as_tokens(text, tokenizer) for text in expected]
    assert row.unshown == (("prompt",) if family == "deepseek_r1" else ())
    rendered = tokenizer(render(messages, tokenizer), add_special_tokens=False)["input_ids"]
    assert row.input_ids in (rendered, [*rendered, tokenizer.eos_token_id])


def as_tokens(text: str, tokenizer: Any) -> str:
    """`text` as its tokens read: some special tokens swallow whitespace."""
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | CONTENT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(CONTENT, inner, max_size=2),
    max_leaves=4,
)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def glm_pairs(arguments: dict[str, Any]) -> str:
    return "".join(
        f"\n<arg_key>{key}</arg_key>\n"
        f"<arg_value>{value if isinstance(value, str) else as_json(value)}</arg_value>"
        for key, value in arguments.items()
    )


CALLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "llama3": lambda a: f'{{"name": "weather", "parameters": {as_json(a)}}}<|eot_id|>',
    "mistral_tools": lambda a: (
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {as_json(a)}, "id": "call00001"}}]</s>'
    ),
    "qwen3": lambda a: (
        f'<tool_call>\n{{"name": "weather", "arguments": {as_json(a)}}}\n</tool_call><|im_end|>'
    ),
    "glm45": lambda a: (
        f"\n<think></think>\n<tool_call>weather{glm_pairs(a)}\n</tool_call><|observation|>"
    ),
    "deepseek_v3": lambda a: (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{as_json(a)}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    ),
}


@pytest.mark.parametrize("family", CALLS)
@given(st.dictionaries(CONTENT, VALUES, max_size=3), CONTENT.filter(bool), CONTENT.filter(bool))
def test_a_call_with_any_arguments_is_learned_whole(
    family: str, arguments: dict[str, Any], given_back: str, said: str
) -> None:
    messages = [user("Rain?"), calling(arguments), result(given_back), assistant(said)]
    call, answer = learned(row_of(messages, family), family)
    assert call == CALLS[family](arguments)
    assert answer == FAMILIES[family].learned(said, True)


ROUNDS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), max_size=2),  # the calls of each message before the answer
        st.sampled_from(["", "field", "tags"]),  # where the answer's reasoning is, if it has one
        st.booleans(),  # a word beside the calls
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("family", FAMILIES)
@given(rounds=ROUNDS, with_system=st.booleans(), ends_with_call=st.booleans())
def test_a_mask_never_takes_from_one_message_what_is_of_another(
    family: str, rounds: list[Any], with_system: bool, ends_with_call: bool
) -> None:
    """Every message has a name of its own; a template may refuse, but the mask may not mix."""
    messages: list[Message] = [system("")] if with_system else []
    for calls, reasoning, beside in rounds:
        messages.append(user(""))
        for number in calls:
            messages.append(calling(*[{"of": "", "x": 1}] * max(number, 1)))
            messages += [result("")] * max(number, 1)
            messages[-1 - max(number, 1)]["content"] = "beside " if beside else ""
        messages.append(assistant("<think>t</think>" if reasoning == "tags" else ""))
        if reasoning == "field":
            messages[-1]["reasoning_content"] = "thought"
    if ends_with_call:
        messages[-1] = calling({"of": ""})
    messages = [named(message, f"({i})") for i, message in enumerate(messages)]
    try:
        row = row_of(messages, family)
    except InputError:
        return
    learned_runs = learned(row, family)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(learned_runs) == len(turns)
    for turn, text in zip(turns, learned_runs, strict=True):
        assert set(re.findall(r"\(\d+\)", text)) == {f"({turn})"}
    rest = "".join(text for took, text in runs(row, family_tokenizer(family)) if not took)
    assert not set(re.findall(r"\((\d+)\)", rest)) & set(map(str, turns))


def named(message: Message, name: str) -> Message:
    """`message` with `name` in everything that it says."""
    if message["content"] or "tool_calls" not in message:
        message = {**message, "content": message["content"] + name}
    if "reasoning_content" in message:
        message = {**message, "reasoning_content": message["reasoning_content"] + name}
    calls = [
        {**call, "function": {**call["function"], "arguments": {"of": name, "x": 1}}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3"}))
def test_prefixes_rendered_one_by_one_give_the_same_spans(family: str) -> None:
    """Where a conversation begins with the renderings of its beginnings, these show the turns."""
    tokenizer, compared = family_tokenizer(family), 0
    for messages in CONVERSATIONS.values():
        tools = [WEATHER] if any("tool_calls" in message for message in messages) else []
        try:
            answers = find_answers(messages, tokenizer, tools)
        except InputError:
            continue
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, (start, end) in zip(turns, answers.spans, strict=True):
            before = render(messages[:turn], tokenizer, True, tools)
            through = render(messages[: turn + 1], tokenizer, False, tools)
            if answers.text.startswith(before) and answers.text.startswith(through.rstrip()):
                compared += 1
                own = answers.text[start:end]
                for next_turn in ("<|user|>", "<|observation|>"):  # GLM's answers end with these
                    own = own.removesuffix(next_turn)
                assert own.rstrip() == through[len(before) :].rstrip()
    assert compared >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_is_learned_behind_the_tokens_that_ask_for_it(family: str) -> None:
    tokenizer = family_tokenizer(family)
    for messages in CONVERSATIONS.values():
        try:
            row = row_of(messages, family)
            tools = [WEATHER] if any("tool_calls" in message for message in messages) else []
            asking = render(messages[:-1], tokenizer, True, tools)
            answers = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"]
            earlier = messages[: 1 + max(answers, default=-1)]
        except InputError:
            continue
        if earlier and row_of(earlier, family).apart:
            assert row.apart  # as answers that the model itself has written stand before it
            continue
        asked = tokenizer(asking, add_special_tokens=False)["input_ids"]
        said = "prompt" not in row.unshown
        assert said == (row.input_ids[: len(asked)] == asked)
        if said:
            assert (row.labels[len(asked) - 1], row.labels[len(asked)]) == (
                IGNORE,
                row.input_ids[len(asked)],
            )


def test_generation_markers_say_the_same() -> None:
    tokenizer = copy.deepcopy(family_tokenizer("chatml"))
    tokenizer.chat_template = (FOLDER / "chatml_generation.jinja").read_text(encoding="utf-8")
    for case, messages in CONVERSATIONS.items():
        if any("tool_calls" in message for message in messages):
            continue
        row = tokenize(Sample(tuple(messages), None, case), tokenizer, 100_000)
        marked = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert row.input_ids == marked["input_ids"]
        assert [int(label != IGNORE) for label in row.labels] == marked["assistant_masks"]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.bos])
def test_a_template_that_writes_the_bos_gives_one_and_not_two(family: str) -> None:
    tokenizer = family_tokenizer(family)
    row = row_of(TWO_TURNS, family)
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id  # it adds one by itself
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_anywhere_keeps_the_labels_before_it(family: str) -> None:
    whole = row_of(TWO_TURNS, family)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE)
    for max_length in range(first + 1, len(whole) + 1):
        cut = row_of(TWO_TURNS, family, max_length)
        assert cut.input_ids == whole.input_ids[:max_length]
        assert cut.labels == whole.labels[:max_length]
        assert cut.truncated == (max_length < len(whole))
    with pytest.raises(InputError, match=rf"rows.jsonl:1: .* begins at token {first + 1} of"):
        row_of(TWO_TURNS, family, first)
