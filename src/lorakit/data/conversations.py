"""The values of a row to messages, tool calls and tool descriptions, each checked on its own.

Messages come out in OpenAI's form, as chat templates expect it: text as content, and the arguments
of a call as an object. Which columns hold them is decided in `lorakit.data.formats`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.data import strict_json
from lorakit.data.pictures import source_of
from lorakit.data.sources import Row
from lorakit.errors import InputError, did_you_mean, listed

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`, `tool_calls`, and what else a template may read (`name`).

`content` is a string, also where a call is all that the assistant says. Where pictures stand in a
message it is a list of parts, `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`
with a picture as `lorakit.data.pictures` keeps it; None is one that the row's column still gives.
A call is `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its `id` if it
has one.
"""

IMAGE = "image"
"""The type of a part that is a picture, and the key that holds it."""

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # Names that OpenAI has used for the same.
    "developer": "system",
    "function": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
"""Roles of sharegpt's messages whose value is a call as JSON."""

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **ROLES,
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    **dict.fromkeys(CALL_ROLES, "assistant"),
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}

_DEEPEST = 32
_MOST_MESSAGES = 1000  # finding the answers among them takes seconds, and grows as the square


def kind_of_value(value: object) -> str:
    """`a string`, `null`, …, for messages."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null", bytes: "binary"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def string(row: Row, value: object, what: str, empty: bool = True) -> str:
    """`value`, with `\\n` for each `\\r\\n`, if it is text that a tokenizer takes.

    Raises:
        InputError: it is none, or holds a NUL or half of a surrogate pair; with `empty=False`,
            it is blank.
    """
    if not isinstance(value, str):
        cure = "; write it as JSON text" if isinstance(value, (dict, list)) else ""
        raise row.error(f"{what} is {kind_of_value(value)}, expected a string{cure}")
    if not empty and not value.strip():
        raise row.error(f"{what} is empty; fill it or drop the row")
    if "\0" in value:  # C code behind tokenizers, files and terminals ends a text there
        raise row.error(f"{what} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone in JSON; tokenizers cannot take it
        raise row.error(f"{what} holds half of a surrogate pair; repair it") from error
    return value.replace("\r\n", "\n")


def list_of(row: Row, value: object, what: str, of: str) -> list[Any]:
    """`value` if it is a list; raises InputError otherwise."""
    if not isinstance(value, list):
        raise row.error(f"{what} is {kind_of_value(value)}, expected a list of {of}")
    return value


def conversation(
    row: Row,
    column: str,
    keys: tuple[str, str] = ("role", "content"),
    named_roles: bool = False,
) -> list[Message]:
    """The messages in a column: a list of objects, whose keys for role and content are `keys`.

    With `named_roles`, sharegpt's roles are known too, and a message may have `role` and
    `content` all the same.
    """
    of = f"{{{', '.join(keys)}}} objects"
    items = list_of(row, row.values[column], f"'{column}'", of)
    roles = SHAREGPT_ROLES if named_roles else ROLES
    messages = []
    for i, item in enumerate(items):
        what, own = f"{column}[{i}]", keys
        if not isinstance(item, dict):
            raise row.error(f"{what} is {kind_of_value(item)}, expected an object with {keys}")
        if named_roles and "role" in item:
            if "from" in item:
                raise row.error(f"{what} has both 'from' and 'role'; remove one")
            own = ("role", "content")
        messages.append(_message(row, item, what, own, roles))
    return messages


def _message(
    row: Row, item: dict[str, Any], what: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> Message:
    role_key, content_key = keys
    if role_key not in item:
        raise InputError(_lacks(row, item, what, role_key, keys))
    name = string(row, item[role_key], f"{what}.{role_key}")
    if name not in roles:
        raise row.error(
            f"{what} has the unknown role {name[:40]!r}{did_you_mean(name, roles)}; "
            f"expected {', '.join(roles)}"
        )
    role = roles[name]
    # Null means that there is none, and templates test for the key.
    others = {k: v for k, v in item.items() if k not in keys and v is not None}
    for taken in {"role", "content"} & others.keys():
        raise row.error(f"{what} has both '{content_key}' and '{taken}'; remove one")
    content: object = item.get(content_key)
    calls = _calls(row, others, role, what)
    if name in CALL_ROLES:
        calls += tool_calls(row, content, f"{what}.{content_key}")
        content = ""
    if content is None and calls:
        content = ""
    elif content_key not in item:
        raise InputError(_lacks(row, item, what, content_key, keys))
    message: Message = {"role": role, "content": _text(row, content, f"{what}.{content_key}")}
    if calls:
        message["tool_calls"] = calls
    for key, value in others.items():
        message[key] = plain(row, value, f"{what}.{key}")
    return message


def _lacks(row: Row, item: Mapping[str, Any], what: str, key: str, keys: tuple[str, str]) -> str:
    return (
        f"{row.where}: {what} has no '{key}', expected an object with {keys}; "
        f"it has {listed(map(str, item)) or 'nothing'}"
    )


def _text(row: Row, value: object, what: str) -> Any:
    """Content as one string, itself or its text parts put together; parts where it has pictures."""
    if not isinstance(value, list):
        return string(row, value, what)
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        own = f"{what}[{i}]"
        if kind in (IMAGE, "image_url"):
            parts.append({"type": IMAGE, IMAGE: _picture(row, part, own)})
        elif kind == "text":
            parts.append({"type": "text", "text": string(row, part.get("text"), f"{own}.text")})
        else:
            found = f"of the type {kind!r:.40}" if kind else kind_of_value(part)
            raise row.error(
                f"{own} is {found}, and only text and pictures are read; expected "
                "{type: text, text: ...} or {type: image, path: ...}: remove other parts or drop "
                "the row"
            )
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


_PICTURE_KEYS = ("image", "path", "url", "image_url", "bytes", "base64")


def _picture(row: Row, part: dict[str, Any], what: str) -> str | None:
    """What a part shows, in OpenAI's or transformers' form; None for one without a picture."""
    given = {key: part[key] for key in _PICTURE_KEYS if part.get(key) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise row.error(f"{what} names several pictures ({', '.join(given)}); leave one")
    [(key, value)] = given.items()
    if key == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if key == "base64" and isinstance(value, str):
        value = f"data:image;base64,{value}"
    return source_of(row, value, f"{what}.{key}")


def text_of(content: Any) -> str:
    """The text of a message's content, without its pictures."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part["type"] == "text")


def pictures_of(content: Any) -> list[Any]:
    """The pictures of a message's content, in order."""
    if not isinstance(content, list):
        return []
    return [part[IMAGE] for part in content if part["type"] == IMAGE]


def _calls(row: Row, others: dict[str, Any], role: str, what: str) -> list[dict[str, Any]]:
    """Takes the calls out of a message's further keys: `tool_calls`, or the older one."""
    calls = []
    for key in ("tool_calls", "function_call"):
        given = others.pop(key, None)
        if given is None or given == []:
            continue
        if role != "assistant":
            raise row.error(
                f"{what} is a {role} message with '{key}'; only assistant messages call tools"
            )
        calls += tool_calls(row, given, f"{what}.{key}")
    return calls


def tool_calls(row: Row, value: object, what: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, from `{name, arguments}` with or without `function` around it.

    `value` is one of them or a list, or either as JSON; so are `arguments`, which come out as an
    object.
    """
    value = _from_json(row, value, what, "{name, arguments}")
    given = value if isinstance(value, list) else [value]
    if not given:
        raise row.error(f"{what} has no call; expected {{name, arguments}}")
    calls = []
    for i, item in enumerate(given):
        inner = f"{what}[{i}]" if isinstance(value, list) else what
        call = _function(row, item, inner, "{name, arguments}")
        function = call["function"]
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        arguments = _from_json(row, arguments, f"{inner}.arguments", "an object")
        if not isinstance(arguments, dict):
            raise row.error(
                f"{inner}.arguments is {kind_of_value(arguments)}, expected an "
                "object like {name: value}"
            )
        arguments = plain(row, arguments, f"{inner}.arguments")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The optional `tools` column: functions as `{type: function, function: {name, ...}}`.

    It may be a list or the JSON of one, and a function may stand without the object around it.
    Null, an empty text and an empty list mean that there are none.
    """
    value = row.values.get("tools")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = _from_json(row, value, "'tools'", "a list of functions")
    found = []
    for i, item in enumerate(list_of(row, value, "'tools'", "functions")):
        what = f"tools[{i}]"
        tool = _function(row, _from_json(row, item, what, "a function"), what, "{name, parameters}")
        parameters = tool["function"].get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise row.error(
                f"{what}.parameters is {kind_of_value(parameters)}, expected an "
                "object (a JSON schema)"
            )
        found.append(plain(row, tool, what))
    return tuple(found)


def _function(row: Row, item: object, what: str, expected: str) -> dict[str, Any]:
    """`item` with `function` around it and its name checked."""
    if not isinstance(item, dict):
        raise row.error(f"{what} is {kind_of_value(item)}, expected an object {expected}")
    kind = item.get("type") or "function"
    if "function" not in item:
        item = {"function": {k: v for k, v in item.items() if k != "type" or kind != "function"}}
    elif kind != "function":
        raise row.error(f"{what} is of the type {kind!r:.40}; only 'function' is supported")
    function = item["function"]
    if not isinstance(function, dict) or not function.get("name"):
        raise row.error(f"{what} has no function name; expected an object {expected}")
    string(row, function["name"], f"{what}.name")
    return {"type": "function", **{k: v for k, v in item.items() if k != "type" and v is not None}}


def _from_json(row: Row, value: object, what: str, expected: str) -> Any:
    """What a string holds as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.parse(value)
    except ValueError as error:
        raise row.error(f"{what} is not JSON ({error}); expected {expected}") from error


def plain(row: Row, value: Any, what: str, depth: int = 0) -> Any:
    """`value` if it is made of JSON's types, as far as templates are shown it.

    Raises:
        InputError: there is another type in it, NaN or Inf, or it is nested too deeply.
    """
    if depth > _DEEPEST:
        raise row.error(f"{what[:80]} is nested deeper than {_DEEPEST} levels; flatten it")
    if isinstance(value, str):
        return string(row, value, what)
    if isinstance(value, list):
        return [plain(row, inner, f"{what}[{i}]", depth + 1) for i, inner in enumerate(value)]
    if isinstance(value, dict):
        return {
            string(row, key, f"a key of {what}"): plain(row, inner, f"{what}.{key}", depth + 1)
            for key, inner in value.items()
        }
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    found = "NaN or Inf" if isinstance(value, float) else kind_of_value(value)
    raise row.error(f"{what} is {found}; expected a JSON value")


def history(row: Row) -> list[Message]:
    """The earlier turns in the optional `history` column.

    They are pairs [question, answer], as ChatGLM and alpaca have them, or messages (ChatGLM3);
    either may be JSON, as in CSV files.
    """
    value = row.values.get("history")
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    value = _from_json(row, value, "'history'", "a list of pairs [question, answer]")
    items = list_of(row, value, "'history'", "pairs [question, answer]")
    if items and isinstance(items[0], dict):
        return conversation(replace(row, values={"history": items}), "history")
    turns: list[Message] = []
    for i, pair in enumerate(items):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(f"history[{i}] must be a pair [question, answer]")
        turns += exchange(*(string(row, text, f"history[{i}]") for text in pair))
    return turns


def exchange(question: str, answer: str) -> list[Message]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_conversation(row: Row, messages: list[Message]) -> None:
    """Refuses a conversation that nothing can be learned from. Raises InputError."""
    roles = [message["role"] for message in messages]
    if len(roles) > _MOST_MESSAGES:
        raise row.error(f"{len(roles):,} messages, and a row may have {_MOST_MESSAGES:,}; split it")
    if roles[:2] == ["system", "system"]:
        if row.values.get("system"):
            what, cure = "a system message in the 'system' column and in the messages", "remove one"
        else:
            names = ("messages", "conversations", "history", "prompt", "chosen")
            lists = (name for name in names if isinstance(row.values.get(name), list))
            column = next(lists, "input")
            what, cure = f"two system messages at the beginning of '{column}'", "join them"
        raise row.error(f"{what}; {cure}")
    if "assistant" not in roles:
        raise row.error("no assistant message, so there is nothing to learn; add one")
    if roles.index("assistant") == 0 and roles.count("assistant") == 1:
        raise row.error("nothing comes before the answer; add a user message")
    for message in messages:
        content = message["content"]
        if message["role"] == "user" and not (text_of(content).strip() or pictures_of(content)):
            raise row.error("a user message is empty; fill it or drop the row")
