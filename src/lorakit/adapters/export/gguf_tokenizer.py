"""A tokenizer as GGUF metadata: tokens, types, merges or scores, special numbers, chat template.

llama.cpp knows tokenizers by name, not by rule. A byte-level BPE is matched by the rule that cuts
its text into words; one whose rule is not known here is refused, as a wrong name would cut text
otherwise without a word.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf

from lorakit.adapters.export.gguf_layout import GgufFamily
from lorakit.errors import InputError
from lorakit.models.template_files import Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The rules as tokenizer.json files have them; `{}` is how many digits stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_DIGIT, _THREE_DIGITS = _WORDS.replace("{}", ""), _WORDS.replace("{}", "{1,3}")
_MARKS = (  # letters with their marks, and a digit at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GLM = (gguf.MODEL_ARCH.CHATGLM, gguf.MODEL_ARCH.GLM4)


def add_tokenizer(
    writer: gguf.GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    family: GgufFamily,
    vocab_size: int,
    model: str,
) -> None:
    """Writes the tokenizer's part of a GGUF file.

    Args:
        vocab_size: the rows of the embedding; what the tokenizer lacks of them is filled up.
        model: the model's name, for messages.

    Raises:
        InputError: llama.cpp has no tokenizer like this, or lorakit does not know its name.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    bpe = rules.get("model", {})
    if bpe.get("type") != "BPE":
        kind = bpe.get("type") or type(tokenizer).__name__
        raise InputError(f"{model} has a tokenizer ({kind}) that lorakit cannot write as GGUF")
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in bpe["merges"]]
    if not merges:
        raise InputError(f"the tokenizer of {model} has no merges, which llama.cpp needs")
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= vocab_size:
        raise InputError(
            f"the tokenizer of {model} has {max(by_number) + 1} tokens, its embedding {vocab_size}"
        )
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    writer.add_token_list(tokens)
    types = _token_types(tokenizer, rules, by_number, vocab_size)
    writer.add_token_types(types)
    if bpe.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        starts_with_space = tokenizer.tokenize("a")[0].startswith("▁")
        writer.add_add_space_prefix(starts_with_space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(rules, family, model))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, tokenizer, family)


def _token_types(
    tokenizer: PreTrainedTokenizerBase,
    rules: dict[str, Any],
    by_number: dict[int, str],
    vocab_size: int,
) -> list[int]:
    added = {token["id"]: token["special"] for token in rules["added_tokens"]}
    pieces = bool(rules["model"].get("byte_fallback"))

    def kind(number: int) -> gguf.TokenType:
        token = by_number.get(number)
        if token is None:
            return gguf.TokenType.UNUSED
        if pieces and number == tokenizer.unk_token_id:
            return gguf.TokenType.UNKNOWN
        if number in added:
            return gguf.TokenType.CONTROL if added[number] else gguf.TokenType.USER_DEFINED
        if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return gguf.TokenType.BYTE
        return gguf.TokenType.NORMAL

    return [int(kind(number)) for number in range(vocab_size)]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores: the largest is joined first, so they are the ranks' negatives."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    return [-float(rank.get(token, len(merges) + number)) for number, token in enumerate(tokens)]


def _pre_tokenizer(rules: dict[str, Any], family: GgufFamily, model: str) -> str:
    """llama.cpp's name (`llama-vocab.cpp`) for the rule that cuts text into words."""
    whole_first = bool(rules["model"].get("ignore_merges"))
    names = {
        ("gpt-2",): "gpt-2",
        ("digits", "gpt-2"): "smollm",
        (_ONE_DIGIT,): "qwen2",
        (_THREE_DIGITS,): "llama-bpe" if whole_first else "dbrx",
        (_MARKS,): "qwen35",
        (_TEKKEN,): "tekken",
        (_O200K,): "gpt-4o",  # gpt-oss
    }
    if family.arch in _GLM:
        names[(_THREE_DIGITS,)] = "glm4" if whole_first else "chatglm-bpe"
    own = rules.get("pre_tokenizer") or {}
    steps = own["pretokenizers"] if own.get("type") == "Sequence" else [own]
    name = names.get(tuple(step for step in map(_step, steps) if step))
    # Ranks made from tiktoken's, as OpenAI's are, build every token: whole words change nothing.
    expected = whole_first if name == "gpt-4o" else name in ("llama-bpe", "tekken", "glm4")
    if name is None or whole_first != expected:
        raise InputError(
            f"the tokenizer of {model} cuts text into words by a rule that lorakit has no "
            "llama.cpp name for: lorakit merge, then llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def _step(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer in a word; empty for one that cuts nothing."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt-2" if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split":
        # Where the rule covers all text, keeping the pieces or removing the gaps is the same.
        whole = (step.get("behavior"), step.get("invert"))
        if whole in (("Isolated", False), ("Removed", True)):
            return str(step["pattern"].get("Regex"))
    return f"unknown: {kind}"


def _add_special(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, family: GgufFamily
) -> None:
    ids = tokenizer("a").input_ids
    adds_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    adds_eos = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    # Of other families llama.cpp finds the token that ends a turn by its text.
    if family.arch in _GLM and "<|user|>" in tokenizer.get_vocab():
        writer.add_eot_token_id(tokenizer.get_vocab()["<|user|>"])
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    add_templates(writer, tokenizer.chat_template)


def add_templates(writer: gguf.GGUFWriter, templates: Templates | None) -> None:
    """Writes chat templates, those of further names too, as llama.cpp reads them."""
    if isinstance(templates, dict):
        named = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(named)
    elif templates:
        writer.add_chat_template(templates)
