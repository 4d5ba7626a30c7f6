"""A tiny model whose next token depends on the last one alone, so that a test knows what it writes.

Whole phrases are single tokens. The chat template ends the prompt for an answer with a token that
tells whether a tool's result or something else comes before it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import byte_tokenizer

ASK, AGAIN, END = "<|ask|>", "<|again|>", "<|im_end|>"
"""What asks for an answer: behind a user's message, behind a tool's result; and what ends it."""

TEMPLATE = (
    "{%- if tools -%}{{- '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- set ns = namespace(asks='<|ask|>') -%}"
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{{- ns.asks -}}{%- endif -%}"
    "{{- m.content -}}"
    "{%- for call in m.tool_calls or [] -%}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' -}}'
    "{{- call.function.arguments | tojson + '}\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- set ns.asks = '<|again|>' if m.role == 'tool' else '<|ask|>' -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' + ns.asks -}}{%- endif -%}"
)


def calling(name: str, arguments: str) -> str:
    """A phrase that calls a function, as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def save_scripted_model(
    folder: Path, follows: Mapping[str, Mapping[str, float]], noise: float = 0.0
) -> Path:
    """Writes a Llama whose layers add nothing, with the logits of what follows each token.

    Args:
        follows: by a token's text those of the tokens that follow it; the others' are about 0.
        noise: in the head, so that an adapter can tell phrases apart that follow the same token.
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    texts = dict.fromkeys([ASK, AGAIN, *follows, *(t for own in follows.values() for t in own)])
    known = tokenizer.get_vocab()
    new = [t for t in texts if t not in known]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new])
    tokenizer.chat_template = TEMPLATE
    size = 256
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    vocab = tokenizer.get_vocab()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded = torch.linalg.qr(torch.randn(size, size))[0]
        used = {text: number for number, text in enumerate(follows)}
        weight = model.model.embed_tokens.weight
        weight.copy_(embedded[len(used) + torch.arange(len(weight)) % (size - len(used))])
        model.lm_head.weight.normal_(std=noise) if noise else model.lm_head.weight.zero_()
        for text, number in used.items():
            weight[vocab[text]] = embedded[number]
            for next_text, logit in follows[text].items():
                model.lm_head.weight[vocab[next_text]] += embedded[number] * logit / size**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
