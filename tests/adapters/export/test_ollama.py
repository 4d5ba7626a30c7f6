"""A Modelfile says what the chat template says, or there is none."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from gguf_models import merging_tokenizer, save_family
from lorakit.adapters.export.chat_form import chat_form
from lorakit.adapters.export.ollama import export_ollama, go_template, ollama_name
from lorakit.data.templates import PLAIN_TEMPLATE, render
from lorakit.errors import InputError
from plain_adapters import save_adapter
from tiny import CHATML

CHATML_WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PAIRS = "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% endif %}"
MISTRAL_FIRST = (
    _PAIRS + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if s is defined and loop.index0 == 1 %}{{ s + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = MISTRAL_FIRST.replace("loop.index0 == 1", "loop.last")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role + '\n' + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KNOWN = {
    "ChatML": CHATML,
    "ChatML, default": CHATML_WITH_DEFAULT,
    "Llama 3": LLAMA3,
    "Mistral, first": MISTRAL_FIRST,
    "Mistral, last": MISTRAL_LAST,
    "Gemma": GEMMA,
    "Phi": PHI,
    "lorakit's plain template": PLAIN_TEMPLATE,
}
SYSTEM = {"role": "system", "content": "Answer {briefly}."}
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4\n(four)"},
    {"role": "user", "content": "Thanks ☺"},
    {"role": "assistant", "content": "Not at all."},
    {"role": "user", "content": 'Say "bye".'},
]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that `go_template` writes."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    root: dict[str, Any] = {
        "Messages": messages,
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
    }

    def truth(condition: str, dot: Any, i: int) -> bool:
        if found := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return dot["role"] == found[1]
        if condition == "and $.System (eq $i 1)":
            return bool(root["System"]) and i == 1
        assert condition == "and $.System (eq (len (slice $.Messages $i)) 1)", condition
        return bool(root["System"]) and len(messages[i:]) == 1

    def block(at: int, dot: Any, i: int, live: bool) -> tuple[str, int, str]:
        """The text up to `{{ else … }}` or `{{ end }}`, where that is, and what it says."""
        text = ""
        while at < len(tokens):
            token, at = tokens[at], at + 1
            if not token.startswith("{{"):
                text += token if live else ""
                continue
            action = token[2:-2].strip()
            if action == "end" or action.startswith("else"):
                return text, at, action
            if action == ".Content":
                text += dot["content"] if live else ""
            elif action == "$.System":
                text += root["System"] if live else ""
            elif action == "range $i, $_ := .Messages":
                start = at
                for number, message in enumerate(messages):
                    inner, at, _ = block(start, message, number, live)
                    text += inner
            else:
                assert action.startswith("if "), action
                inner, at = branch(action.removeprefix("if "), at, dot, i, live)
                text += inner
        return text, at, "end"

    def branch(condition: str, at: int, dot: Any, i: int, live: bool) -> tuple[str, int]:
        taken = live and truth(condition, dot, i)
        text, at, stop = block(at, dot, i, taken)
        if stop.startswith("else if "):
            rest, at = branch(stop.removeprefix("else if "), at, dot, i, live and not taken)
            return text + rest, at
        if stop == "else":
            rest, at, _ = block(at, dot, i, live and not taken)
            return text + rest, at
        return text, at

    return block(0, None, -1, True)[0]


@pytest.mark.parametrize("kind", KNOWN)
def test_the_go_template_writes_what_the_jinja_template_writes(kind: str):
    tokenizer = tokenizer_with(KNOWN[kind])
    form = chat_form(tokenizer, bos=False)
    assert form.family == kind.partition(",")[0]
    template = go_template(form)
    starts: list[list[dict[str, str]]] = [[], [SYSTEM]] if form.takes_system else [[]]
    for start in starts:
        for length in (1, 3, 5):
            messages = start + TURNS[:length]
            expected = render(messages, tokenizer, add_generation_prompt=True)
            if not start and form.default_system is not None:
                # Ollama gives the Modelfile's SYSTEM as a message.
                messages = [{"role": "system", "content": form.default_system}, *messages]
            assert run_go(template, messages) == expected


def test_what_the_templates_take_and_do_is_known():
    form = chat_form(tokenizer_with(CHATML_WITH_DEFAULT), bos=False)
    assert form.default_system == "Be helpful."
    assert not form.trims
    assert chat_form(tokenizer_with(LLAMA3), bos=False).trims
    assert chat_form(tokenizer_with(MISTRAL_FIRST), bos=False).folded == "first"
    assert chat_form(tokenizer_with(MISTRAL_LAST), bos=False).folded == "last"
    assert not chat_form(tokenizer_with(GEMMA), bos=False).takes_system


def test_a_bos_that_the_tokenizer_adds_is_left_to_it():
    assert chat_form(tokenizer_with(LLAMA3), bos=False).head == "<|endoftext|>"
    assert chat_form(tokenizer_with(LLAMA3), bos=True).head == ""
    with pytest.raises(InputError, match=r"does not begin with <\|endoftext\|>"):
        chat_form(tokenizer_with(CHATML), bos=True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "leaves out messages"),
        (CHATML.replace("<|im_start|>", "<turn>"), "a user's turn begins with '<turn>user"),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ loop.index }}"),
            "fixed strings",
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('1', 'I') }}"),
            "leaves out messages",
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('«', '') }}"),
            "each between two fixed strings",
        ),
        (CHATML + "{{ strftime_now('%d') if messages | length > 99 }}", "the date of the day"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_does_more_is_refused_with_advice(template: str | None, why: str):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=re.escape(why)):
        chat_form(tokenizer, bos=False)


def test_the_folder_has_the_adapter_and_a_modelfile_that_names_the_base(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", r=2)
    report = export_ollama(adapter, tmp_path / "orders")
    assert report.figures["files"] == ("Modelfile", "adapter.gguf")
    assert report.command == f"ollama create orders -f {tmp_path / 'orders' / 'Modelfile'}"
    assert (tmp_path / "orders" / "Modelfile").read_text() == (
        f"FROM {base}\nADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )
    kind = gguf.GGUFReader(tmp_path / "orders" / "adapter.gguf").get_field("general.type")
    assert kind.contents() == "adapter"


def test_a_folders_name_becomes_one_that_ollama_takes():
    names = {"orders-1.2_b": "orders-1.2_b", "my orders": "my-orders", "输出": "adapter"}
    names |= {"订单 v2": "v2", ".hidden": "hidden", "a" * 90: "a" * 80}
    assert {folder: ollama_name(folder) for folder in names} == names


def test_a_merged_folder_stands_on_its_own_and_says_the_system_message(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", r=2)
    export_ollama(adapter, tmp_path / "orders", merged=True, system="You take orders.\nNo chat.")
    text = (tmp_path / "orders" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert 'SYSTEM """You take orders.\nNo chat."""\n' in text
    assert sorted(p.name for p in (tmp_path / "orders").iterdir()) == ["Modelfile", "model.gguf"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", r=2)
    with pytest.raises(InputError, match="a Modelfile cannot hold"):
        export_ollama(adapter, tmp_path / "a", system='say """')
    (adapter / "chat_template.jinja").write_text(GEMMA)
    with pytest.raises(InputError, match="takes no system message"):
        export_ollama(adapter, tmp_path / "a", system="x")
    with pytest.raises(InputError, match="--dtype"):
        export_ollama(adapter, tmp_path / "a", dtype="int3")
    (adapter / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<turn>"))
    with pytest.raises(InputError, match="lorakit knows ChatML, Llama 3, Mistral, Gemma, Phi"):
        export_ollama(adapter, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
