"""Chat templates that loop or fill the memory end, and others are rendered meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chat_families import FAMILIES, family_tokenizer

from lorakit.data import bounded_templates
from lorakit.data.bounded_templates import (
    TemplateFailedError,
    TemplateTimeoutError,
    apply_template,
    free_variables,
    isolated_templates,
    rendered,
)
from lorakit.data.templates import render
from lorakit.time_limit import TimeLimitError, time_limit

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALL = {"type": "function", "id": "call12345", "function": {"name": "f", "arguments": {"a": "é'"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello <|im_end|> \U0001f600"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\n\n b "},
        {"role": "assistant", "content": "c", "reasoning_content": "why", "tool_calls": None},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e", "thinking": "because"},
    ],
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "call12345", "name": "f"},
        {"role": "assistant", "content": "y"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "odd", "content": "z"}],
    [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
]
SYNTAX = [
    "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}"
    "{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}{{ n.a }}",
    "{{ tools | tojson(indent=2) }}{{ dict(a='<b>', b=none) | tojson(separators=(',', ':')) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ documents }}{{ bos_token }}",
    "{{ raise_exception('no ' + messages[0].role) }}",
    "{% set n = namespace(_a=1) %}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ strftime_now('%Y') }}{{ enable_thinking }}{{ unknown }}{{ lipsum.__globals__ }}",
    "{% for %}",
    "   {% if true %}\n  x\n  {% endif %}\n{{ messages[-1]['content'] | trim | upper }}",
]


def outcome(write: Any) -> tuple[bool, str]:
    try:
        return True, str(write())
    except Exception as error:
        return False, str(error)


@pytest.mark.parametrize("name", [*FAMILIES, *range(len(SYNTAX))])
def test_what_is_rendered_elsewhere_is_what_transformers_renders(name: Any, tokenizer: Any):
    if isinstance(name, int):
        tokenizer.chat_template = SYNTAX[name]
    else:
        tokenizer = family_tokenizer(name)
    texts = 0
    for messages in CONVERSATIONS:
        for options in (
            {},
            {"add_generation_prompt": True, "enable_thinking": False},
            {"tools": [TOOL]},
        ):
            here = outcome(
                lambda m=messages, o=options: tokenizer.apply_chat_template(m, tokenize=False, **o)
            )
            with isolated_templates():
                there = outcome(lambda m=messages, o=options: apply_template(tokenizer, m, **o))
            assert there[0] == here[0]
            if here[0] or name not in (4, 6):  # these say the same in other words
                assert there[1] == here[1]
            texts += there[0]
    assert texts or name in (3, 4, 5, 6, 8)


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_templates, "SECONDS", 0.5)
    monkeypatch.setattr(bounded_templates, "SECONDS_HERE", 0.5)


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{{ 7 ** (7 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' | center(10 ** 12) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:>999999999}'.format('a') }}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% set n = namespace(x='a') %}"
        "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ lipsum(n=99999999) }}",
        "{{ [0] * 10 ** 9 }}",
    ],
)
def test_a_template_that_takes_too_much_ends_and_the_next_one_is_rendered(template: str):
    begin = time.monotonic()
    with pytest.raises((TemplateTimeoutError, TemplateFailedError)):
        rendered(template, {})
    assert time.monotonic() - begin < 60
    assert rendered("{{ a }}", {"a": "b"}) == "b"


@pytest.mark.usefixtures("half_a_second")
def test_looking_for_the_variables_of_a_template_is_bounded_too():
    template = "{% set a = 1 %}{{ a }}{{ b }}{% if c is defined %}{{ c }}{% endif %}{{ messages }}"
    assert free_variables(template) == {"b", "c", "messages"}
    begin = time.monotonic()
    with pytest.raises((TemplateTimeoutError, TemplateFailedError)):
        free_variables("{{ 7 ** (7 ** 10) }}{{ b }}")  # computed while it is compiled
    assert time.monotonic() - begin < 60


def test_others_are_rendered_while_one_loops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounded_templates, "SECONDS", 3)
    with ThreadPoolExecutor(4) as threads:
        loops = [threads.submit(outcome, lambda: rendered(LOOP, {})) for _ in range(1)]
        time.sleep(0.2)
        assert [rendered("{{ i }}", {"i": i}) for i in range(9)] == list(map(str, range(9)))
        assert not any(loop.done() for loop in loops)
        for loop in loops:
            assert "takes more than 3 s" in loop.result(timeout=60)[1]


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize("isolated", [True, False])
def test_a_conversation_that_a_template_loops_on_is_refused_in_one_line(
    tokenizer: Any, isolated: bool
):
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}x"
    good, bad = ([{"role": "user", "content": content}] for content in ("good", "bad"))

    def both() -> None:
        assert render(good, tokenizer) == "x"
        with pytest.raises(TemplateTimeoutError, match=r"takes more than 0\.5 s .* begins 'bad'"):
            render(bad, tokenizer)
        assert render(good, tokenizer) == "x"

    if isolated:
        with isolated_templates():
            both()
    else:
        both()


def test_the_limit_of_time_reaches_nothing_behind_it():
    for _ in range(20):
        raised = False
        try:
            with time_limit(0.01):
                end = time.monotonic() + 0.25  # so that both end at about the same time
                while time.monotonic() < end:
                    pass
        except TimeLimitError:
            raised = True
        for _ in range(50_000):
            pass
        if raised:
            break
    assert raised
    with time_limit(60):
        pass


def test_a_process_that_is_gone_is_replaced():
    assert rendered("{{ a }}", {"a": 1}) == "1"
    for worker in list(bounded_templates._pool()._idle):
        worker._process.kill()
        worker._process.wait()
    assert rendered("{{ a }}", {"a": 2}) == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_process_has_processes_of_its_own():
    assert rendered("{{ a }}", {"a": 1}) == "1"
    child = os.fork()
    if child == 0:
        os._exit(0 if rendered("{{ a }}", {"a": 2}) == "2" else 1)
    for i in range(20):
        assert rendered("{{ i }}", {"i": i}) == str(i)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def orphaned() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has a template loop, and the process that does that."""
    code = (
        "import threading, time\n"
        "from lorakit.data import bounded_templates as b\n"
        "worker = b._started()\n"
        "print(worker._process.pid, flush=True)\n"
        f"request = b.pickle.dumps(({LOOP!r}, {{}}, 1.0))\n"
        "worker.ask(lambda pipe: b.write_frame(pipe, request), 1.0)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_loop_does_not_outlive_the_process_that_asked_for_it(
    orphaned: tuple[subprocess.Popen[str], int],
):
    process, worker = orphaned
    time.sleep(0.3)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if "\nState:\tZ" in _status(worker):  # it ended, and nobody has asked for its status yet
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


def _status(process: int) -> str:
    try:
        with open(f"/proc/{process}/status") as file:  # noqa: PTH123
            return "\n" + file.read()
    except OSError:
        return ""


def test_many_threads_share_few_processes():
    before = threading.active_count()
    with ThreadPoolExecutor(16) as threads:
        texts = threads.map(lambda i: rendered("{{ i }}", {"i": i}), range(200))
        assert list(texts) == list(map(str, range(200)))
    assert len(bounded_templates._pool()._idle) <= 4
    assert threading.active_count() < before + 25
