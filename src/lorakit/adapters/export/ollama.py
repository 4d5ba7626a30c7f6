"""A folder that `ollama create` makes a model of: GGUF files, and a Modelfile beside them.

The chat template goes over in Go's template language, which Ollama has instead of Jinja; what can
be translated is `chat_form.py`'s. Format: Ollama's docs/modelfile.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import atomic
from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.adapter_tokenizer import has_tokenizer, own_tokenizer
from lorakit.adapters.added_tokens import add_rows
from lorakit.adapters.chat_template import use_template
from lorakit.adapters.derived import base_of
from lorakit.adapters.export.chat_form import ChatForm, chat_form
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.gguf_files import (
    export_gguf_adapter,
    export_gguf_model,
    mixture_of,
)
from lorakit.commands import quoted
from lorakit.data.templates import ensure_template
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.folder_name import folder_name
from lorakit.lora.checkpoint import read_config
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.names import resolve
from lorakit.models.skeleton import read_base_config, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GUARDED = '"""'


def ollama_name(folder: str) -> str:
    """A model's name for a folder's: Ollama takes up to 80 ASCII letters and digits and `_-.`."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder).strip("-.")[:80]
    return name or "adapter"


@reserves("output")
def export_ollama(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    merged: bool = False,
    dtype: str | None = None,
    system: str | None = None,
) -> Exported:
    """Writes the folder `output` with a `Modelfile` and the GGUF file that it names.

    Args:
        merged: write base + adapter as one model; else the adapter alone, on the base where it
            lies (a GGUF file, or a folder that Ollama converts).
        dtype: of the written weights; None is float16 for a model and float32 for an adapter.
        system: the system message of conversations that bring none.

    Raises:
        InputError: the adapter, the base, its chat template or `output` cannot be used.
    """
    dtype = dtype or ("float16" if merged else "float32")
    mixture_of(dtype)
    name = base_of(adapter, read_config(adapter), base)
    tokenizer, other_template = _tokenizer(adapter, name)
    ids = tokenizer("a").input_ids
    adds_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    form = chat_form(tokenizer, adds_bos)
    if system is not None and not form.takes_system:
        raise InputError(f"--system: the chat template of {name} takes no system message")
    with atomic.new_folder(output) as folder:
        if merged:
            written = export_gguf_model(adapter, folder / "model.gguf", base=base, dtype=dtype)
            source, second = "./model.gguf", None
        else:
            written = export_gguf_adapter(adapter, folder / "adapter.gguf", base=base, dtype=dtype)
            source, second = str(resolve(name).path.absolute()), "./adapter.gguf"
        text = modelfile(form, source, second, _stops(form, tokenizer), system)
        atomic.write_file(folder / "Modelfile", text)
    notices = list(dict.fromkeys(filter(None, (other_template, *written.notices))))
    if form.trims:
        notices.append("the chat template takes off space around messages, Ollama's cannot")
    if not form.takes_system:
        notices.append("the chat template takes no system message: Ollama leaves one out")
    name = ollama_name(folder_name(output))
    files = ("Modelfile", Path(written.output).name)
    return Exported(
        str(output),
        f"for Ollama: {output} ({', '.join(files)})\n"
        f"the chat template is of the family {form.family}, and was compared with it",
        f"ollama create {quoted(name)} -f {quoted(Path(output) / 'Modelfile')}",
        tuple(notices),
        {"files": files},
    )


def modelfile(
    form: ChatForm, source: str, adapter: str | None, stops: list[str], system: str | None = None
) -> str:
    """The text of a Modelfile."""
    lines = [f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f"TEMPLATE {_quoted('TEMPLATE', go_template(form))}")
    said = form.default_system if system is None else system
    if said is not None:
        lines.append(f"SYSTEM {_quoted('--system', said)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(form: ChatForm) -> str:
    """The form in Go's template language, over Ollama's `.Messages` and `.System`."""
    system = folded = ""
    if form.system:
        before, after = form.system
        system = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ else }}}}'
    if form.folded:
        # With a system message the first user's turn is number 1.
        which = {"first": "(eq $i 1)", "last": "(eq (len (slice $.Messages $i)) 1)"}[form.folded]
        folded = f"{{{{ if and $.System {which} }}}}{{{{ $.System }}}}{form.separator}{{{{ end }}}}"
    user = f"{form.user[0]}{folded}{{{{ .Content }}}}{form.user[1]}"
    assistant = f"{form.assistant[0]}{{{{ .Content }}}}{form.assistant[1]}"
    for text in (form.head, *form.user, *form.assistant, *(form.system or ()), form.generation):
        if "{{" in text or "}}" in text:
            raise InputError(f"the chat template writes {text!r}, which a Go template cannot")
    return (
        f"{form.head}{{{{ range $i, $_ := .Messages }}}}{system}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}'
        f"{{{{ end }}}}{'{{ end }}' if system else ''}{{{{ end }}}}{form.generation}"
    )


def _stops(form: ChatForm, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The token that ends an answer in the template, and the tokenizer's own."""
    vocabulary = tokenizer.get_vocab()
    found = [form.assistant[1].strip(), str(tokenizer.eos_token or "")]
    return list(dict.fromkeys(stop for stop in found if stop in vocabulary))


def _tokenizer(adapter: str | Path, base: str) -> tuple[PreTrainedTokenizerBase, str]:
    """The adapter's tokenizer where it has more tokens, else the base's, with the adapter's chat
    template; and a notice where that is not the base's.
    """
    source = resolve(base)
    read_base_config(source.path)  # which reports damaged files better
    try:
        tokenizer = source.layout.tokenizer()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model: the tokenizer of {base} is missing or damaged: copy or fetch the model again"
        ) from error
    present: Any = tokenizer.chat_template
    if has_tokenizer(Path(adapter)):
        model = skeleton(source.path)
        add_rows(model, read_files(adapter, base))
        tokenizer = own_tokenizer(Path(adapter), tokenizer, vocabulary_size(model)) or tokenizer
    notice = use_template(tokenizer, adapter, base, present)
    ensure_template(tokenizer)
    return tokenizer, notice


def _quoted(what: str, text: str) -> str:
    if _GUARDED in text or text.endswith('"'):
        raise InputError(f'{what}: a Modelfile cannot hold """ or a text that ends in "')
    return f"{_GUARDED}{text}{_GUARDED}"
