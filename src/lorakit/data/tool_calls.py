"""Tool calls in the text of an answer, read in the form in which the chat template writes them.

Which form that is, is found by a round trip: the template writes a call, and the first form that
reads the same call back is its own. So a template needs no name, and one that does not write calls
has no form. A form is one function and one line of `FORMS`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data import strict_json
from lorakit.data.answer_form import AnswerForm, answer_form
from lorakit.data.call_stream import MakeReader, TaggedForm, json_calls
from lorakit.data.call_values import Tools, literal
from lorakit.data.conversations import Message
from lorakit.data.spans import find_answers
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Call:
    """A function's name, its arguments, and the id of the call where it has one."""

    name: str
    arguments: dict[str, Any]
    id: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """As OpenAI's API has it, with the arguments as an object."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"type": "function", **({"id": self.id} if self.id else {}), "function": function}


class MalformedCallError(ValueError):
    """An answer begins a tool call that cannot be read; the message says why."""


@dataclass(frozen=True)
class CallForm:
    """How a family of templates writes calls.

    Attributes:
        opening: matches where the first call begins; all text before it is the answer's content.
        read: the calls in the text from there on. Raises ValueError where one cannot be read.
        reader: makes a reader of them while they are written; None reads them at their end.
    """

    name: str
    opening: re.Pattern[str]
    read: Callable[[str, Tools], list[Call]]
    reader: MakeReader | None = None


@dataclass(frozen=True)
class ToolCalls:
    """Reads the answers that a chat template's models write.

    Args:
        form: of the calls; None reads none.
        answers: of the answers around them.
    """

    form: CallForm | None
    answers: AnswerForm

    def message(self, text: str, tools: Tools = ()) -> Message:
        """An answer as OpenAI's message, with `tool_calls` and `reasoning_content` if it has them.

        A call that stands in the reasoning is none. Arguments that a form writes as plain text
        get the types of the function's JSON schema.

        Args:
            text: what the model wrote, special tokens included, without the end token.
            tools: the functions that the prompt showed, `{type: function, function: {...}}`.

        Raises:
            MalformedCallError: a call has begun and cannot be read.
        """
        thought, answer = self.answers.split(text)
        found = self.form.opening.search(answer) if self.form else None
        content = answer[: found.start()] if found else answer
        message: Message = {"role": "assistant", "content": self._plain(content)}
        if thought and (inner := self._thought(thought)):
            message["reasoning_content"] = inner
        if found is None or self.form is None:
            return message
        try:
            calls = self.form.read(answer[found.start() :], tools)
            if not calls:
                raise ValueError("there is no call in it")
        except RecursionError as error:
            raise MalformedCallError("it is nested too deeply") from error
        except (ValueError, SyntaxError) as error:
            raise MalformedCallError(" ".join(str(error).split())) from error
        message["tool_calls"] = [call.message for call in calls]
        return message

    def plain(self, text: str) -> Message:
        """The answer as a message whose content is all of its text, whatever it calls."""
        return {"role": "assistant", "content": self._plain(text)}

    def _plain(self, text: str) -> str:
        return self.answers.special.sub("", text).strip()

    def _thought(self, text: str) -> str:
        for opening, closing in (*self.answers.reasoning, ("", self.answers.opened)):
            text = text.strip().removeprefix(opening).removesuffix(closing)
        return self._plain(text)


def tool_calls_of(tokenizer: PreTrainedTokenizerBase) -> ToolCalls:
    """How answers of models with the tokenizer's chat template are read."""
    answers = answer_form(tokenizer)
    return ToolCalls(_form_of(tokenizer, answers), answers)


_PROBE = Call("find_city", {"city": "Cork", "days": 2})
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE.name,
        "description": "Finds a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


def _form_of(tokenizer: PreTrainedTokenizerBase, answers: AnswerForm) -> CallForm | None:
    asked = {"role": "user", "content": "a"}
    calling = {"role": "assistant", "content": "", "tool_calls": [_PROBE.message]}
    try:
        found = find_answers([asked, calling], tokenizer, [_PROBE_TOOL])
    except InputError:
        return None
    if "tools" in found.unshown:
        return None
    start, end = found.spans[0]
    written = found.text[start:end]
    for form in FORMS:
        try:
            message = ToolCalls(form, answers).message(written, [_PROBE_TOOL])
        except MalformedCallError:
            continue
        found_calls = [call["function"] for call in message.get("tool_calls", ())]
        if found_calls == [_PROBE.message["function"]]:
            return form
    return None


# --- the forms ------------------------------------------------------------------------------------


def _named(value: Any) -> Call:
    """A call from `{"name": ..., "arguments": {...}}`, or `parameters` as Llama has it."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("a call needs a name, as in {name, arguments}")
    arguments = _arguments(value.get("arguments", value.get("parameters")))
    given = value.get("id")
    return Call(value["name"], arguments, given if isinstance(given, str) else "")


def _arguments(value: Any) -> dict[str, Any]:
    """Arguments as an object; none and an empty text are no arguments."""
    if isinstance(value, str) and value.strip():
        value = strict_json.parse(value)
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise ValueError("the arguments must be a JSON object")
    return value


def _blocks(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands between the two, time after time; the last may lack its end."""
    for part in text.split(opening)[1:]:
        yield part.partition(closing)[0].strip()


def _hermes(text: str, tools: Tools) -> list[Call]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write it."""
    return [_named(strict_json.parse(b)) for b in _blocks(text, "<tool_call>", "</tool_call>")]


_XML_FUNCTIONS = TaggedForm(
    r"<function=(?P<name>[^>\n]+)>",
    r"<parameter=(?P<key>[^>\n]+)>(?:\n|(?=[^\n]))",
    "\n</parameter>",
    "</function>",
    r"\n<parameter=(?P<key>[^>\n]+)>|\n?</function>\s*</tool_call>",
)


def _xml_functions(text: str, tools: Tools) -> list[Call]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""
    found = _XML_FUNCTIONS.read(text, tools)
    return [Call(name, strict_json.parse(arguments)) for name, arguments in found]


_KEYS_AND_VALUES = TaggedForm(
    r"<tool_call>\s*(?P<name>[\w.-]+)(?=\s*<arg_key>|\s*</tool_call>)",
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>",
    "</arg_value>",
    "</tool_call>",
    r"\n?<arg_key>|\n?</tool_call>",
    closed=False,
)


def _key_value_tags(text: str, tools: Tools) -> list[Call]:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>` (GLM)."""
    found = _KEYS_AND_VALUES.read(text, tools)
    return [Call(name, strict_json.parse(arguments)) for name, arguments in found]


_LLAMA = r'\A\s*(?:<\|python_tag\|>\s*)?(?=\{\s*"(?:name|type)")'


def _json_objects(text: str, tools: Tools) -> list[Call]:
    """`{"name": ..., "parameters": {...}}`, several with `;` between them (Llama 3)."""
    text = _without_marks(text.lstrip().removeprefix("<|python_tag|>"))
    calls, at = [], 0
    while text[at:].strip(" \n;"):
        at = len(text) - len(text[at:].lstrip(" \n;"))
        value, end = strict_json.decode(text, at)
        calls.append(_named(value))
        at = end
    return calls


def _json_list(text: str, tools: Tools) -> list[Call]:
    """A mark and a list of `{"name": ..., "arguments": {...}}` (Mistral, Phi-4-mini, Granite)."""
    begin = text.index("[{") if "[{" in text else text.index("{")
    value, _ = strict_json.decode(text, begin)
    return [_named(one) for one in (value if isinstance(value, list) else [value])]


def _mistral_names(text: str, tools: Tools) -> list[Call]:
    """`[TOOL_CALLS]NAME[ARGS]{...}`, once for each call (Mistral from its tokenizer 11 on)."""
    calls = []
    for block in _blocks(text, "[TOOL_CALLS]", "[TOOL_CALLS]"):
        name, marked, arguments = block.partition("[ARGS]")
        if not marked:
            raise ValueError("a call needs [ARGS]")
        value, _ = strict_json.decode(arguments, len(arguments) - len(arguments.lstrip()))
        name, _, given = name.partition("[CALL_ID]")
        calls.append(Call(name.strip(), _arguments(value), given.strip()))
    return calls


_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _deepseek(text: str, tools: Tools) -> list[Call]:
    """DeepSeek's tokens around type, name and JSON (V3, R1), or around name and JSON (V3.1)."""
    calls = []
    for block in _blocks(text, _BEGIN, _END):
        first, _, rest = block.partition(_SEP)
        fenced = re.fullmatch(r"([^\n]+)\n```json\n(.*?)\n?```", rest, re.DOTALL)
        name, arguments = fenced.groups() if fenced else (first, rest)
        calls.append(Call(name.strip(), _arguments(strict_json.parse(arguments))))
    return calls


_PYTHON = r"(?:<\|tool_call_start\|>|\A\s*)(?=\[\w+\()"


def _python_list(text: str, tools: Tools) -> list[Call]:
    """`[NAME(KEY=VALUE, ...)]`, literals of Python (Llama 4, LFM2), or Llama 3's JSON."""
    if re.search(_LLAMA, text):  # which models of Llama 4 write, too
        return _json_objects(text, tools)
    begin, end = text.index("["), text.rindex("]")
    tree = ast.parse(text[begin : end + 1], mode="eval").body
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else ():
        if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
            raise ValueError("expected calls with named arguments")
        given = {str(word.arg): literal(word.value, text[begin:]) for word in node.keywords}
        calls.append(Call(node.func.id, _arguments(strict_json.parse(json.dumps(given)))))
    return calls


_STRING = r'"(?:[^"\\]|\\.)*"'
_OBJECTS = json_calls(
    rf'"name"\s*:\s*(?P<quoted>{_STRING})\s*,\s*"(?:arguments|parameters)"\s*:',
    r'"name"\s*:',
)

FORMS = (
    CallForm("hermes", re.compile(r"<tool_call>"), _hermes, _OBJECTS),
    CallForm(
        "xml functions",
        re.compile(r"(?:<tool_call>\s*)?<function="),
        _xml_functions,
        _XML_FUNCTIONS,
    ),
    CallForm(
        "key and value tags",
        re.compile(r"<tool_call>"),
        _key_value_tags,
        _KEYS_AND_VALUES,
    ),
    CallForm("mistral", re.compile(r"\[TOOL_CALLS\]\s*(?=\[|\{)"), _json_list, _OBJECTS),
    CallForm(
        "mistral names",
        re.compile(r"\[TOOL_CALLS\]"),
        _mistral_names,
        json_calls(
            r"\[TOOL_CALLS\](?P<name>[^\[\]{}]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]", r"\[TOOL_CALLS\]"
        ),
    ),
    CallForm(
        "deepseek",
        re.compile(f"<｜tool▁calls▁begin｜>|{_BEGIN}"),
        _deepseek,
        json_calls(
            f"{_BEGIN}(?:\\w*{_SEP}(?=[^{{]))?(?P<name>[^<\n{{]+?)(?:\n```json\n|{_SEP})", _BEGIN
        ),
    ),
    CallForm("json list", re.compile(r"<\|?tool_call\|?>"), _json_list, _OBJECTS),
    CallForm("llama", re.compile(_LLAMA), _json_objects, _OBJECTS),
    CallForm("python list", re.compile(f"{_PYTHON}|{_LLAMA}"), _python_list),
)
"""In the order in which they are tried: those whose marks say more come first."""


def _without_marks(text: str) -> str:
    """Text without an end mark behind it, such as `<|eot_id|>`."""
    return re.sub(r"<\|(?:eot_id|eom_id|end|im_end)\|>\s*\Z", "", text)
