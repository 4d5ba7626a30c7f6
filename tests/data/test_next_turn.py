"""What is appended behind an answer is what the template writes there in the whole conversation."""

from typing import Any

import pytest
from chat_families import FAMILIES, family_tokenizer

from lorakit.data.next_turn import drops_reasoning, next_turn
from lorakit.data.templates import render
from lorakit.errors import InputError

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "Four."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
WITHOUT_TOOLS = ("chatml", "mistral", "gemma", "phi3", "phi4", "glm4")


def ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["user", "tool"])
def test_a_conversation_that_is_appended_to_is_the_one_that_the_template_writes(
    name: str, kind: str
):
    if kind == "tool" and name in WITHOUT_TOOLS:
        pytest.skip("its template knows no tools")
    tokenizer = family_tokenizer(name)
    tools = TOOLS if kind == "tool" and name != "deepseek_v3" else []
    answer, more = (CALLING, [RESULT]) if kind == "tool" else (ANSWER, [ASKED])
    whole = render([ASKED, answer, *more], tokenizer, add_generation_prompt=True, tools=tools)
    wanted = ids(whole, tokenizer)
    added = next_turn(more, tokenizer, tools)
    assert added
    assert wanted[-len(added) :] == added
    if (name, kind) == ("deepseek_r1", "tool"):
        return  # its template does not end an answer with one call
    before = tokenizer.decode(wanted[: -len(added)])
    assert before.endswith(tuple(tokenizer.all_special_tokens)), "the answer's end is not repeated"
    # With the answer's own last token nothing is added; with another one, the template's first.
    end = wanted[-len(added) - 1]
    assert next_turn(more, tokenizer, tools, last=end) == added
    assert next_turn(more, tokenizer, tools, last=5) == [end, *added]


def test_two_results_stand_behind_each_other():
    tokenizer = family_tokenizer("qwen3")
    two = tokenizer.decode(next_turn([RESULT, {**RESULT, "content": "5"}], tokenizer, TOOLS))
    assert two.startswith("\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_resp")
    assert two.endswith("5\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    llama = family_tokenizer("llama3")  # takes one call a message
    several = llama.decode(next_turn([RESULT, {**RESULT, "content": "5"}], llama, TOOLS))
    assert several.count("ipython") == 2


def test_a_result_names_the_call_that_the_model_has_written():
    tokenizer = family_tokenizer("mistral_tools")
    written = tokenizer.decode(
        next_turn([{**RESULT, "tool_call_id": "abc123XYZ"}], tokenizer, TOOLS)
    )
    assert '"call_id": "abc123XYZ"' in written


def test_a_template_without_a_place_for_the_answer_is_an_error():
    for name in ("gemma", "mistral"):
        with pytest.raises(InputError):
            next_turn([RESULT], family_tokenizer(name), strict=True)


def test_it_is_known_which_templates_drop_the_reasoning_of_earlier_turns():
    found = {name: drops_reasoning(family_tokenizer(name)) for name in FAMILIES}
    assert {name for name, drops in found.items() if drops} == {"qwen3", "qwen3_thinking", "glm45"}
