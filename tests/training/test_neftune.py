"""NEFTune's noise is that of the paper for each row, however the rows lie in a batch."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from lorakit.errors import InputError
from lorakit.training.neftune import EmbeddingNoise
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from small_runs import recipe
from tiny import save_tiny_encoder_decoder

WIDTH, ALPHA = 32, 5.0


def embeddings_of_a_batch(values: dict[str, Any], alpha: float) -> tuple[Any, torch.Tensor]:
    """A batch of all rows, and what reaches the first layer when its loss is taken."""
    setup = set_up(load_recipe(values, [("training.neftune_noise_alpha", alpha)]))
    trainer = setup.trainer()
    batch = trainer.train_dataset[list(range(len(setup.data.train)))]
    reached: list[torch.Tensor] = []
    first = setup.model.get_base_model().model.layers[0]
    handle = first.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0].detach()))
    setup.model.train()
    torch.manual_seed(0)
    trainer.compute_loss(setup.model, batch)
    handle.remove()
    return batch, reached[0]


@pytest.mark.parametrize("padding_free", [True, False])
def test_each_row_has_the_noise_of_its_own_length(
    tiny_model: Path, rows: Path, tmp_path: Path, padding_free: bool
):
    values = recipe(tiny_model, rows, tmp_path / "run", per_device_train_batch_size=48)
    values["data"] |= {"eval": 0, "padding_free": padding_free, "share_prefixes": False}
    batch, noisy = embeddings_of_a_batch(values, ALPHA)
    _, plain = embeddings_of_a_batch(values, 0.0)
    noise = noisy - plain
    if padding_free:
        begins = batch["cu_seq_lens_q"].tolist()
        parts = [noise[0, a:b] for a, b in pairwise(begins)]
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        parts = [own[:length] for own, length in zip(noise, lengths, strict=True)]
    assert len({len(part) for part in parts}) > 3
    for part in parts:
        bound = ALPHA / math.sqrt(len(part) * WIDTH)
        assert part.abs().max() <= bound * (1 + 1e-5)
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_embeddings_of_held_out_rows_have_no_noise(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    found = []
    for alpha in (0.0, ALPHA):
        values = recipe(tiny_model, rows, tmp_path / "run", neftune_noise_alpha=alpha)
        found.append(set_up(load_recipe(values)).trainer().held_out_scores())
    assert found[0] == found[1]


def test_a_model_that_does_not_call_its_embedding_is_named(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = recipe(tiny_model, rows, tmp_path / "run", neftune_noise_alpha=5)
    setup = set_up(load_recipe(values))
    trainer = setup.trainer()
    model = setup.model.get_base_model().model
    monkeypatch.setattr(type(model.embed_tokens), "__call__", type(model.embed_tokens).forward)
    with pytest.raises(InputError, match="neftune_noise_alpha"):
        trainer.compute_loss(setup.model, trainer.train_dataset[[0, 1]])


def test_of_an_encoder_decoder_the_prompt_has_noise_and_the_answer_has_none(tmp_path: Path):
    model = T5ForConditionalGeneration.from_pretrained(save_tiny_encoder_decoder(tmp_path))
    ids = torch.randint(0, 250, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :3]}
    reached: dict[str, torch.Tensor] = {}
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        stack.block[0].register_forward_pre_hook(
            lambda _, inputs, name=name: reached.__setitem__(name, inputs[0].detach())
        )
    with EmbeddingNoise(model, ALPHA).on(batch):
        model(**batch)
    noise = reached["encoder"] - model.shared(ids)
    for row, length in ((0, 9), (1, 4)):
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert 0.9 * bound < noise[row].abs().max() <= bound * (1 + 1e-5)
    assert torch.equal(reached["decoder"], model.shared(ids[:, :3]))
