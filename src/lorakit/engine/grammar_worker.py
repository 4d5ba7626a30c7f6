"""The process that checks grammars for `grammars.py`, which ends it when it must.

It is a script that imports llguidance and nothing else, so that it starts in a tenth of a second
and its memory can be limited. A grammar that fills the memory or the stack ends this process, and
not the server. Requests and replies are lines of JSON.
"""

import json
import sys
import threading
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space."""

STACK = 1 << 20
"""Bytes of stack, less than threads of the server have."""

LIMITS = {
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Of llguidance: so large a grammar at most, and so much work for one token."""

WHITESPACE = r" |\n[ \t]{0,40}"
"""Between the parts of JSON: none, a space, or a line's end with an indent, so that a model that
likes whitespace does not go on with it for ever."""


def definition(kind: str, text: str) -> str:
    """A grammar in llguidance's own form; raises ValueError for what has none."""
    import llguidance

    if kind == "json":
        settings: Any = {"whitespace_pattern": WHITESPACE}
        return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=settings))
    if kind == "lark":
        return str(llguidance.LLMatcher.grammar_from_lark(text))
    if kind == "grammar":
        lark = llguidance.gbnf_to_lark.any_to_lark(text)
        return str(llguidance.LLMatcher.grammar_from_lark(lark))
    return str(llguidance.grammar_from(kind, text))


def answer(kind: str, text: str) -> dict[str, str]:
    """`definition`: the grammar in llguidance's form; or `error`: what is wrong with it."""
    import llguidance

    try:
        made = definition(kind, text)
        limits = llguidance.LLParserLimits(**LIMITS)
        wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(made, limits=limits)
    except BaseException as error:  # a panic of Rust is no Exception
        wrong, messages = True, [str(error) or type(error).__name__]
    return {"error": messages[0][:2000]} if wrong else {"definition": made}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: the time is limited all the same
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):  # as on macOS
        return


def main(places: list[str]) -> None:
    """Checks grammars until the last one.

    Args:
        places: where llguidance may lie, if it is not found.
    """
    import signal

    sys.path += places
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    _limit_memory()
    threading.stack_size(STACK)
    thread = threading.Thread(target=_work)
    thread.start()
    thread.join()


def _work() -> None:
    print(json.dumps({}), flush=True)
    for request in sys.stdin:
        print(json.dumps(answer(*json.loads(request))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
