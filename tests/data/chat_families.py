"""Chat templates of the known model families, each with a byte tokenizer that has its tokens.

The templates in `templates/` were written for these tests in the form that each family's models
read; which form is said at the top of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"

Learned = Callable[[str, bool], str]
"""What is learned of an answer without whitespace at its ends, given whether it is the last."""


@dataclass(frozen=True)
class Family:
    """A family's tokens, and what its template makes of a plain answer."""

    name: str
    special: tuple[str, ...]
    eos: str
    learned: Learned
    bos: str | None = None
    tags: tuple[str, ...] = ()  # tokens of their own, but not special
    strips: bool = False  # special tokens swallow the whitespace behind them


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_TAGS = tuple(
    f"<｜tool▁{name}｜>"
    for name in (
        *("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"),
        *("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"),
    )
)
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")
MISTRAL_TOOLS = (
    *("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def closed(by: str, opening: str = "", last_opening: str = "") -> Learned:
    return lambda answer, last: (last_opening if last else opening) + answer + by


FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", CHATML, "<|im_end|>", closed("<|im_end|>")),
        Family("llama3", LLAMA, "<|eot_id|>", closed("<|eot_id|>"), "<|begin_of_text|>"),
        Family("mistral", MISTRAL, "</s>", closed("</s>", " ", " "), "<s>"),
        Family("mistral_tools", MISTRAL + MISTRAL_TOOLS, "</s>", closed("</s>", " ", " "), "<s>"),
        Family(
            "gemma",
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
            "<eos>",
            closed("<end_of_turn>"),
            "<bos>",
        ),
        Family(
            "qwen3",
            CHATML,
            "<|im_end|>",
            closed("<|im_end|>", "", "<think>\n\n</think>\n\n"),
            tags=QWEN,
        ),
        Family(
            "qwen3_thinking",
            CHATML,
            "<|im_end|>",
            closed("<|im_end|>", "", "\n</think>\n\n"),
            tags=QWEN,
        ),
        Family(
            "glm4",
            (*GLM, "<|endoftext|>"),
            "<|endoftext|>",
            lambda answer, last: "\n" + answer + ("<|endoftext|>" if last else "<|user|>"),
        ),
        Family(
            "glm45",
            (*GLM, "<|endoftext|>"),
            "<|endoftext|>",
            lambda answer, last: (
                "\n<think></think>\n" + answer + ("<|endoftext|>" if last else "<|user|>")
            ),
            tags=QWEN,
        ),
        Family(
            "phi3",
            ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
            "<|endoftext|>",
            closed("<|end|>"),
            strips=True,
        ),
        Family("phi4", (*CHATML, "<|im_sep|>"), "<|im_end|>", closed("<|im_end|>")),
        Family(
            "deepseek_v3", DEEPSEEK + DEEPSEEK_TAGS, DEEPSEEK[1], closed(DEEPSEEK[1]), DEEPSEEK[0]
        ),
        Family(
            "deepseek_r1",
            DEEPSEEK,
            DEEPSEEK[1],
            closed(DEEPSEEK[1]),
            DEEPSEEK[0],
            ("<think>", "</think>", *DEEPSEEK_TAGS),
        ),
    )
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token a byte and the family's own; it adds the BOS by itself where the family's does."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, rstrip=family.strips) for t in family.special])
    raw.add_tokens(list(family.tags))
    if family.bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, raw.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=family.bos,
        eos_token=family.eos,
        extra_special_tokens=[t for t in family.special if t not in (family.bos, family.eos)],
        chat_template=(FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
    )
