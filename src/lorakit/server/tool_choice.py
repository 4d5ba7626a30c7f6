"""Which calls an answer must or may make, as a grammar.

`tool_choice`, `strict` and `parallel_tool_calls` say so. Without any of these an answer is written
freely, and calls are read from it.
"""

from __future__ import annotations

from typing import Any

from lorakit.engine.call_layout import CallLayout
from lorakit.engine.grammar import Grammar
from lorakit.errors import InputError
from lorakit.server.errors import bad_field
from lorakit.server.payloads import ChatRequest

_NO_FORM = (
    "the chat template of this model has no form of calls that can be enforced: leave {0} out, or "
    "ask for JSON by response_format"
)


def check_choice(asked: ChatRequest) -> None:
    """Whether the functions that must be called are among the tools.

    Raises:
        ApiError: 400, they are not.
    """
    names = [tool.function.name for tool in asked.tools or ()]
    if asked.called is not None and asked.called not in names:
        raise bad_field(
            f"tool_choice: there is no tool {asked.called!r}", "tool_choice", "invalid_value"
        )
    if asked.must_call and not names:
        raise bad_field("tool_choice goes with tools: give some", "tool_choice", "invalid_value")
    if len(set(names)) < len(names):
        raise bad_field("two tools have the same name", "tools", "invalid_value")


def wanted_form(
    asked: ChatRequest, layout: CallLayout | None, opened: str
) -> tuple[str, Grammar] | None:
    """The field that says what an answer must look like, and its grammar; None for any text.

    Args:
        opened: what closes the reasoning that the prompt has opened; it comes before the form.

    Raises:
        ApiError: 400, the chat template's calls cannot be enforced.
    """
    tools, form = asked.shown_tools(), asked.form()
    strict = next((n for n, tool in enumerate(asked.tools or ()) if tool.function.strict), None)
    field = "tool_choice" if asked.must_call else "parallel_tool_calls"
    if strict is not None and not asked.must_call:
        field = f"tools[{strict}].function.strict"
    enforced = asked.must_call or strict is not None or asked.parallel_tool_calls is False
    of_json = form is not None and form[1].kind == "json"
    if not tools or not (enforced or (of_json and layout is not None)):
        return form and (form[0], form[1].behind(opened))
    if layout is None:
        raise bad_field(_NO_FORM.format(field), field, "unsupported_value")
    if form is not None and not of_json:
        raise bad_field(f"{form[0]} does not go with {field}: leave one of them out", form[0])
    chosen: list[dict[str, Any]] = [
        tool for tool in tools if asked.called in (None, tool["function"]["name"])
    ]
    try:
        grammar = layout.grammar(
            chosen,
            parallel=asked.parallel_tool_calls is not False and asked.called is None,
            instead=None if form is None else form[1],
            optional=not asked.must_call,
        )
    except InputError as error:
        raise bad_field(f"tools: {error}", "tools", "unsupported_value") from error
    return ("tools", grammar)
