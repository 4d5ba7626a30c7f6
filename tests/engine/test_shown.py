"""What a chat template leaves out of a conversation is an error, and its variables can be set."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.shared_options import chat_template_kwargs
from lorakit.data.prompts import Prompt
from lorakit.data.templates import template_variables
from lorakit.engine.answer_all import answer_all
from lorakit.engine.conversation import ChatSession
from lorakit.engine.engine import Engine
from lorakit.engine.sampling import Sampling
from lorakit.engine.shown import NotShownError, shown_text
from lorakit.errors import InputError
from tiny import byte_tokenizer

SHORT = Sampling(max_new_tokens=2)
TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
ASKS = {"role": "user", "content": "a"}
SYSTEM = {"role": "system", "content": "a"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAYS_AND_CALLS = {**CALLS, "content": "let me see"}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "r"}
ANSWER = {"role": "assistant", "content": "<think>\nw\n</think>\n\nb"}
THOUGHT = {"role": "assistant", "content": "b", "reasoning_content": "why"}


@pytest.fixture
def engine(start: Any) -> Engine:
    made: Engine = start(max_rows=2, adapters={})
    return made


def tokenizer(template: str) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def family(name: str) -> Any:
    return tokenizer((TEMPLATES / f"{name}.jinja").read_text())


def hidden(of: Any, messages: list[Any], tools: Any = ()) -> Any:
    """The place of what is left out; None if nothing is."""
    try:
        shown_text(messages, of, tools)
    except NotShownError as error:
        return error.place
    return None


FAMILIES: list[tuple[str, list[Any], list[Any], Any]] = [
    ("chatml", [SYSTEM, ASKS], [], None),
    ("chatml", [ASKS], TOOLS, ("tools", 0)),
    ("mistral", [ASKS], TOOLS, ("tools", 0)),
    ("gemma", [ASKS], TOOLS, ("tools", 0)),
    ("mistral_tools", [ASKS], TOOLS, None),
    ("llama3", [ASKS], TOOLS, None),
    ("qwen3", [ASKS], TOOLS, None),
    ("glm4", [ASKS], TOOLS, None),
    ("mistral", [SYSTEM], [], ("messages", 0, "content")),
    ("mistral", [SYSTEM, ASKS], [], None),
    ("qwen3", [ASKS, ANSWER, ASKS], [], None),  # reasoning of earlier turns is dropped by rule
    ("qwen3", [ASKS, THOUGHT, ASKS], [], None),
    ("glm45", [ASKS, THOUGHT, ASKS], [], None),
    ("chatml", [ASKS, THOUGHT, ASKS], [], ("messages", 1, "reasoning_content")),
    ("qwen3", [ASKS, SAYS_AND_CALLS, RESULT], TOOLS, None),
    ("llama3", [ASKS, CALLS, RESULT], TOOLS, None),
    ("llama3", [ASKS, SAYS_AND_CALLS, RESULT], TOOLS, ("messages", 1, "content")),
    ("glm4", [ASKS, CALLS, RESULT], TOOLS, ("messages", 1, "tool_calls")),
]


@pytest.mark.parametrize(("name", "messages", "tools", "place"), FAMILIES)
def test_what_a_familys_template_leaves_out_is_an_error(
    name: str, messages: list[Any], tools: list[Any], place: Any
) -> None:
    assert hidden(family(name), messages, tools) == place


WITHOUT: list[tuple[str, str, list[Any]]] = [
    ("user", "{% for m in messages %}{{ m.role }}:{{ m.content if m.role != 'user' }}{% endfor %}",
     [SYSTEM, ASKS]),
    ("tool", "{% for m in messages if m.role != 'tool' %}{{ m.role }} {{ m.content }}{% endfor %}",
     [ASKS, {"role": "tool", "content": "25"}]),
    ("system", "Be a bot.{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
     [SYSTEM, ASKS]),
    ("assistant", "{{ messages[0].content }}{{ messages[-1].content }}",
     [ASKS, {"role": "assistant", "content": "said"}, ASKS]),
]  # fmt: skip


@pytest.mark.parametrize(("role", "template", "messages"), WITHOUT)
def test_a_message_that_disappears_is_named_by_its_role(
    role: str, template: str, messages: list[Any]
) -> None:
    with pytest.raises(NotShownError, match=f"of the role {role}") as caught:
        shown_text(messages, tokenizer(template))
    place: Any = caught.value.place
    assert messages[place[1]]["role"] == role


SHOWS = "{% for m in messages %}{{ m.content | trim | tojson }}{% endfor %}"


def test_text_that_is_trimmed_escaped_or_moved_is_there() -> None:
    said = [{"role": "user", "content": '  "é"\n\nx  '}, {"role": "tool", "content": "{'a': 1}"}]
    assert hidden(tokenizer(SHOWS), said) is None
    assert hidden(tokenizer(SHOWS.replace("in messages", "in messages | reverse")), said) is None


def test_looking_takes_time_in_proportion_to_the_conversation() -> None:
    for template in (SHOWS, SHOWS.replace("in messages", "in messages | reverse")):
        of = tokenizer(template)

        def seconds(number: int, of: Any = of) -> float:
            content = 'a "quoted" word, and then some more of it ' * 3
            messages = [{"role": "user", "content": f"{content}{i}"} for i in range(number)]
            start = time.process_time()
            assert hidden(of, messages) is None
            return time.process_time() - start

        seconds(10)
        assert seconds(4000) < 40 * seconds(400) + 0.3


THINKING = (
    "{% for m in messages %}{{ m.content }}{% set content = m.content %}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}"
)


def test_variables_reach_the_template() -> None:
    of = tokenizer(THINKING)
    assert shown_text([ASKS], of) == "a"
    assert shown_text([ASKS], of, variables={}) == "a"
    assert shown_text([ASKS], of, variables={"enable_thinking": False}) == "ano thoughts"
    assert shown_text([ASKS], of, variables={"enable_thinking": True}) == "a"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "enable_thinkin",
            "messages",
            "tools",
            "content",
            "m",
            "add_generation_prompt",
            "tokenize",
        ),
        *(
            "chat_template",
            "eos_token",
            "return_tensors",
            "raise_exception",
            "range",
            "",
            "__doc__",
        ),
    ],
)
def test_a_variable_that_is_not_the_users_is_refused(name: str) -> None:
    of = tokenizer(THINKING + "{{ eos_token }}{{ tools }}{{ add_generation_prompt }}{{ range(2) }}")
    with pytest.raises(InputError, match=r"does not read .*: it reads enable_thinking"):
        shown_text([ASKS], of, variables={name: 1})
    with pytest.raises(InputError, match="it reads none"):
        shown_text([ASKS], tokenizer(SHOWS), variables={name: 1})


def test_a_chat_has_variables_and_says_what_its_template_leaves_out(engine: Engine) -> None:
    said = [ASKS["content"], "and again"]
    engine.tokenizer.chat_template = THINKING
    thinking = ChatSession(engine, sampling=SHORT, variables={"enable_thinking": False})
    plain = ChatSession(engine, sampling=SHORT)
    assert thinking._tokens(ASKS).input_ids == engine.tokenizer("ano thoughts")["input_ids"]
    assert plain._tokens(ASKS).input_ids == engine.tokenizer("a")["input_ids"]
    wrong = ChatSession(engine, sampling=SHORT, variables={"thinking": False})
    with pytest.raises(InputError, match="it reads enable_thinking"):
        wrong.answer(said[0])
    engine.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(InputError, match="of the role system"):
        ChatSession(engine, sampling=SHORT, system="be brief").answer(said[0])


def test_a_file_of_prompts_has_variables_and_what_is_left_out_is_counted(engine: Engine) -> None:
    engine.tokenizer.chat_template = "{{ messages[-1].content }}{{ 'xy' if enable_thinking }}"
    prompts = [Prompt((SYSTEM, ASKS), (), f"line {i}") for i in (1, 2)]
    notices: Counter[str] = Counter()
    answers = list(answer_all(engine, prompts, [None], SHORT, {"enable_thinking": True}, notices))
    assert [answer.prompt_tokens for answer in answers] == [3, 3]
    assert list(notices.values()) == [2]
    assert "role system" in next(iter(notices))
    with pytest.raises(InputError, match=r"line 1: .*does not read 'other'"):
        list(answer_all(engine, prompts, [None], SHORT, {"other": True}))


@pytest.mark.parametrize("text", ["[1]", "{", "5", "enable_thinking"])
def test_the_commands_take_an_object_of_variables(text: str) -> None:
    assert chat_template_kwargs(None) == {}
    assert chat_template_kwargs('{"enable_thinking": false}') == {"enable_thinking": False}
    with pytest.raises(InputError, match="--chat-template-kwargs"):
        chat_template_kwargs(text)


def test_which_variables_a_template_reads() -> None:
    found = {
        "{% if not day is defined %}{% set day = 'x' %}{% endif %}{{ day }}": {"day"},
        "{% set depth = depth | default(3) %}{{ depth }}": {"depth"},
        "{% macro f(a) %}{{ a }}{{ budget }}{% endmacro %}{{ f(1) }}": {"budget"},
        "{% for m in messages %}{% if m %}{% set x = 1 %}{% endif %}{{ x }}{% break %}{% endfor %}":
            set(),
        "{% generation %}{{ q }}{%- endgeneration %}": {"q"},
        "{{ messages }}{{ strftime_now('%d') }}{{ namespace(a=1).a }}": set(),
    }  # fmt: skip
    assert {template: set(template_variables(template)) for template in found} == found
    with pytest.raises(InputError, match="cannot be parsed"):
        template_variables("{% if %}")
