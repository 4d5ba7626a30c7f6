"""The tokenizer of an original folder as transformers' fast one: ids, marks and chat template.

The vocabulary is cut and joined in `sentencepiece_model.py` or `tiktoken_file.py` (GLM-4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.layouts.chatglm.original import TOKENIZER_NAME, Generation, Original
from lorakit.models.layouts.chatglm.sentencepiece_model import sentencepiece_tokenizer
from lorakit.models.layouts.chatglm.template import TEMPLATES
from lorakit.models.layouts.chatglm.tiktoken_file import tiktoken_tokenizer
from lorakit.models.layouts.layout import HUB_OPTIONS
from lorakit.models.template_files import default_of, read_templates

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
MARKS: dict[Generation, tuple[str, ...]] = {
    Generation.CHATGLM2: (*_MASKS, "sop", "eop"),
    Generation.CHATGLM3: (*_MASKS, "sop", "eop", *_ROLES),
    Generation.GLM4: (
        *("<|endoftext|>", *_MASKS, "<sop>", "<eop>", *_ROLES),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
}
"""The special tokens behind the vocabulary, in the order of their ids."""

_STOPS = ("<|user|>", "<|observation|>")  # with which the model gives the word to another


def original_tokenizer(original: Original, **options: Any) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.

    Args:
        options: of transformers' tokenizer, in place of its own.

    Raises:
        InputError: it is missing, damaged, or larger than the model's embedding.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    path, generation = original.path / TOKENIZER_NAME, original.generation
    if not path.is_file():
        raise InputError(f"model: {original.path} has no {TOKENIZER_NAME}: fetch the model again")
    marks = MARKS[generation]
    build = tiktoken_tokenizer if generation is Generation.GLM4 else sentencepiece_tokenizer
    tokenizer = build(path, marks)
    size, rows = tokenizer.get_vocab_size(), original.sizes["padded_vocab_size"]
    if size > rows:
        raise InputError(
            f"model: {path} has {size} tokens, and the model's embedding {rows}: they do not "
            "belong together"
        )
    sop = next(mark for mark in marks if "sop" in mark)
    end, pad = ("<|endoftext|>",) * 2 if generation is Generation.GLM4 else ("</s>", "<unk>")
    if tokenizer.token_to_id(end) is None or tokenizer.token_to_id(pad) is None:
        raise InputError(f"model: {path} has no {end} or no {pad}: fetch the model again")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["[gMASK]", sop, "$A"],
        pair=["[gMASK]", sop, "$A", "$B", end],
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[gMASK]", sop, end)],
    )
    given = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
    own: dict[str, Any] = {
        "eos_token": end,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": original.sizes["seq_length"],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if generation is not Generation.GLM4:
        own["unk_token"] = pad
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own | given)
    if "chat_template" not in options:
        fast.chat_template = _template(original, fast)
    return fast


def generation_settings(original: Original) -> GenerationConfig:
    """Where the model stops writing, and what it is padded with."""
    from transformers import GenerationConfig

    values = original.values
    stops, pad = values.get("eos_token_id"), values.get("pad_token_id")
    if (original.path / TOKENIZER_NAME).is_file():
        tokenizer = original_tokenizer(original, chat_template=None)
        known = [t for t in _STOPS if t in MARKS[original.generation]]
        stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(known)]
        pad = tokenizer.pad_token_id
    return GenerationConfig(eos_token_id=stops, pad_token_id=pad)


def _template(original: Original, tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder's own chat template, if it makes another text than ours, which knows more."""
    ours = TEMPLATES[original.generation]
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    asked.append({"role": "user", "content": "3"})

    def text(template: str) -> str:
        return tokenizer.apply_chat_template(
            asked, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    try:
        own = default_of(read_templates(original.path))
        return ours if own is None or text(own) == text(ours) else own
    except Exception:  # the files may be damaged, and a template is a program: it may fail anyhow
        return ours
