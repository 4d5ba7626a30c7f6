"""A small vision-language model: the bundled language model behind a vision tower of our own.

It has the architecture of Idefics 3 and the first SmolVLM (Marafioti et al. 2025,
arXiv:2504.05299), whose smallest language model is of the bundled one's shape. The tower is
pre-trained (`vision_tower.py`), and least squares bring its features near the embeddings of the
words for what is shown; the language model has never seen such tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.demo.shapes import QUESTIONS, SIZE
from lorakit.demo.vision_tower import (
    PATCH,
    STEPS,
    drawn,
    features_of,
    pretrained_tower,
    tower_config,
)
from lorakit.models.bundled import ALIAS
from lorakit.models.load import load_model

if TYPE_CHECKING:
    import torch

_SHUFFLE = 2  # so many patches of the tower, squared, become one token of the language model
IMAGE_TOKENS = (SIZE // PATCH // _SHUFFLE) ** 2

_ALIGNED, _RIDGE = 1000, 1e-3  # pictures, and how much of a feature's variance is noise

_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_base(folder: Path, seed: int, language: str = ALIAS, tower_steps: int = STEPS) -> None:
    """Makes the model and its processor, and saves them in the new folder `folder`.

    Args:
        seed: of the tower's pictures and weights, and of the projector's.
        language: the language model, a Llama.
        tower_steps: of the tower's pre-training.
    """
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    pixels, labels = drawn(seed, tower_steps)
    tower = pretrained_tower(pixels, labels, seed, tower_steps)
    text, tokenizer = load_model(language, "bfloat16", device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": [*_TOKENS]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text.resize_token_embeddings(len(tokenizer))  # new ones are like the mean of the others
        config = Idefics3Config(
            vision_config=tower_config().to_dict(),
            text_config=text.config.to_dict(),
            scale_factor=_SHUFFLE,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
        model = Idefics3ForConditionalGeneration(config)
    model.model.vision_model.load_state_dict(tower.state_dict())
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    _align(model, tokenizer, pixels[:_ALIGNED], labels[:_ALIGNED])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIZE},
        max_image_size={"longest_edge": SIZE},
        do_image_splitting=False,
    )
    Idefics3Processor(
        images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=_TEMPLATE
    ).save_pretrained(folder)


def _align(model: Any, tokenizer: Any, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """Sets the projector to the ridge regression of the tower's features onto words' embeddings.

    Each of a picture's tokens is to be the mean embedding of the words for its color, its shape and
    its digit: W = Y'X (X'X + λI)^-1, with X (tokens, in) features and Y (tokens, out) embeddings.
    """
    import torch

    connector = model.model.connector
    projection = connector.modality_projection.proj
    words = model.get_input_embeddings().weight.float()

    def embedding(word: str) -> torch.Tensor:
        return words[tokenizer(word, add_special_tokens=False).input_ids].mean(0)

    with torch.no_grad():
        named = [
            torch.stack([embedding(answer) for answer in answers])[labels[:, i]]
            for i, answers in enumerate(QUESTIONS.values())
        ]
        features = features_of(model.model.vision_model, pixels)
        x = connector.pixel_shuffle(features, _SHUFFLE).flatten(0, 1).double()
        y = torch.stack(named).mean(0).repeat_interleave(IMAGE_TOKENS, dim=0).double()
        ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        found = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        projection.weight.copy_(found.T)
