"""The example of an agent: its rows are ones that train, and its loop is one that ends."""

import importlib.util
from pathlib import Path
from typing import Any

import jsonschema

from lorakit.data.spans import find_answers
from lorakit.data.tool_calls import tool_calls_of
from served import Running

FILE = Path(__file__).parents[2] / "examples" / "tool_agent.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("tool_agent", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_agents_rows_are_written_and_read_by_its_template(served: Running) -> None:
    agent, tokenizer = example(), served.engine.tokenizer
    own = tokenizer.chat_template
    tokenizer.chat_template = FILE.with_name("tool_calls.jinja").read_text()
    try:
        reads = tool_calls_of(tokenizer)
        for row in agent.rows(16):
            found = find_answers(row["messages"], tokenizer, row["tools"])
            assert found.unshown == ()
            start, end = found.spans[0]
            said = reads.message(found.text[start:end], row["tools"])
            assert said.get("tool_calls") == row["messages"][1].get("tool_calls")
            for call in said.get("tool_calls", []):
                schema = row["tools"][0]["function"]["parameters"]
                jsonschema.validate(call["function"]["arguments"], schema)
                assert isinstance(agent.run(**call["function"]), int)
        answer = agent.ask(served.openai, served.engine.model_name, "Is it so?", turns=1)
        assert isinstance(answer, str)
    finally:
        tokenizer.chat_template = own
