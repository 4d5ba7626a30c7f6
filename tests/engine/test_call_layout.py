"""The layout of calls is found in templates as their models ship them."""

from pathlib import Path

import pytest
import trl

from lorakit.data.tool_calls import tool_calls_of
from lorakit.engine.call_layout import call_layout
from tiny import byte_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TAGS = ["glm4moe", "qwen3_5_think", "qwen3_6", "nemotron_3_nano"]
PYTHON, JSON = ["lfm2_2_5"], ["qwen2_5", "llama3_1"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "integer"}},
    "required": ["b"],
}


@pytest.mark.parametrize("name", [*TAGS, *PYTHON, *JSON])
def test_a_template_of_a_model_has_a_layout_that_is_enforced(name: str) -> None:
    llguidance = pytest.importorskip("llguidance")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    layout = call_layout(tokenizer, tool_calls_of(tokenizer))
    assert layout is not None
    kind = None if layout.arguments is None else layout.arguments.raw
    assert kind is (True if name in TAGS else False if name in PYTHON else None)
    assert layout.between is not None or name == "llama3_1"
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    grammar = layout.grammar([tool])
    made = llguidance.LLMatcher.grammar_from_lark(grammar.text)
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(made)
    assert not wrong, messages
