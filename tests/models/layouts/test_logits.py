"""An original checkpoint answers as the published architecture does, written down independently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmForCausalLM, GlmForSequenceClassification

import lorakit
from chatglm_folders import config, ranks_file, tensors, write_original
from lorakit.models.load import load_for_task
from plain_chatglm import PlainChatGLM

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.randint(3, 700, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain() -> PlainChatGLM:
    return PlainChatGLM(config(), tensors(config()))


@pytest.fixture(scope="module")
def loaded(chatglm3: Path) -> Any:
    return lorakit.load_model(str(chatglm3), "float32")[0]


def forward(model: Any, *ids: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(*ids, **options)


def test_the_logits_are_those_of_the_published_architecture(loaded: Any, plain: PlainChatGLM):
    assert type(loaded) is GlmForCausalLM
    found, expected = forward(loaded, IDS).logits, plain(IDS)[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, **CLOSE)


def test_padding_on_the_left_changes_no_answer(loaded: Any, plain: PlainChatGLM):
    lengths = (24, 17, 3)
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = IDS * mask  # <unk> is the padding token, 0
    expected = plain(ids, mask, positions)[0]
    for options in ({}, {"position_ids": positions}):  # only distances count
        found = forward(loaded, ids, attention_mask=mask, **options).logits
        for row, length in enumerate(lengths):
            torch.testing.assert_close(found[row, -length:], expected[row, -length:], **CLOSE)
    alone = forward(loaded, IDS[1:2, -17:]).logits
    torch.testing.assert_close(alone[0], expected[1, -17:], **CLOSE)


def test_positions_that_jump_are_followed(loaded: Any, plain: PlainChatGLM):
    positions = torch.arange(24).expand(3, 24) * 3 + torch.arange(3)[:, None] * 7
    found = forward(loaded, IDS, position_ids=positions).logits
    torch.testing.assert_close(found, plain(IDS, positions=positions)[0], **CLOSE)
    assert not torch.allclose(found, plain(IDS)[0], **CLOSE)


def test_tokens_given_one_by_one_with_the_cache_get_the_same_logits(
    loaded: Any, plain: PlainChatGLM
):
    out = forward(loaded, IDS[:, :10], use_cache=True)
    expected, cache = plain(IDS[:, :10])
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    for place in range(10, 24):
        step = IDS[:, place : place + 1]
        out = forward(loaded, step, past_key_values=out.past_key_values, use_cache=True)
        expected, cache = plain(step, cache=cache)
        torch.testing.assert_close(out.logits, expected, **CLOSE)
    torch.testing.assert_close(out.logits, plain(IDS)[0][:, -1:], **CLOSE)


def test_greedy_answers_are_the_same_for_rows_of_any_length(loaded: Any, plain: PlainChatGLM):
    mask = torch.stack([(torch.arange(24) >= start).long() for start in (0, 9, 20)])
    # Only what the model would stop at is a special token here; a random model may write it.
    found = loaded.generate(
        IDS * mask, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=[767]
    )
    for row, start in enumerate((0, 9, 20)):
        ids = IDS[row : row + 1, start:]
        for _ in range(6):
            ids = torch.cat([ids, plain(ids)[0][:, -1:].argmax(-1)], 1)
        assert found[row, start:].tolist() == ids[0].tolist()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"rope_ratio": 50, "seq_length": 512}, {}, id="chatglm3-6b-32k"),
        pytest.param(
            {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"},
            {"stretched": True},
            id="chatglm2-6b-32k",
        ),
        pytest.param({"add_qkv_bias": False}, {}, id="without bias"),
        pytest.param({"multi_query_group_num": 1}, {}, id="one group"),
        pytest.param({"multi_query_group_num": 4}, {}, id="a group a head"),
        pytest.param({"kv_channels": 16, "layernorm_epsilon": 0.1}, {}, id="wide heads"),
    ],
)
def test_every_variant_of_the_configuration_counts(
    tmp_path: Path, changed: dict[str, Any], words: dict[str, Any]
):
    values = config(**changed)
    folder = write_original(tmp_path / "model", values=values, shards=1)
    model, _ = lorakit.load_model(str(folder), "float32")
    expected = PlainChatGLM(values | words, tensors(values))(IDS)[0]
    torch.testing.assert_close(forward(model, IDS).logits, expected, **CLOSE)


def test_the_code_beside_a_checkpoint_is_read_and_never_run(tmp_path: Path):
    values = config(rope_ratio=4)
    folder = write_original(tmp_path / "model", values=values)
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "configuration_chatglm.py"):
        (folder / name).write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nseq_idx = torch.arange(n) / self.rope_ratio\n"
        )
    model, _ = lorakit.load_model(str(folder), "float32")
    expected = PlainChatGLM(values | {"stretched": True}, tensors(values))(IDS)[0]
    torch.testing.assert_close(forward(model, IDS).logits, expected, **CLOSE)
    assert not (tmp_path / "ran").exists()


def test_bin_shards_give_the_model_that_safetensors_give(tmp_path: Path, loaded: Any):
    folder = write_original(tmp_path / "model", form="bin", shards=3)
    model, _ = lorakit.load_model(str(folder), "float32")
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # its own, not the file's


def test_glm_4_is_loaded_with_its_own_stops(tmp_path: Path):
    values = config(rope_ratio=500, layernorm_epsilon=1.5625e-07, eos_token_id=[400, 407, 409])
    folder = write_original(tmp_path / "model", values=values, tokenizer=ranks_file())
    model, _ = lorakit.load_model(str(folder), "float32")
    expected = PlainChatGLM(values, tensors(values))(IDS)[0]
    torch.testing.assert_close(forward(model, IDS).logits, expected, **CLOSE)
    assert model.generation_config.eos_token_id == [400, 407, 409]


def test_the_dtype_is_the_files_unless_another_is_asked_for(tmp_path: Path):
    folder = write_original(tmp_path / "model", dtype=torch.float16)
    for options, expected in (
        ({}, torch.float16),
        ({"dtype": "auto"}, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    ):
        model = lorakit.AutoModelForCausalLM.from_pretrained(folder, **options)
        assert model.dtype == expected
    assert lorakit.load_model(str(folder), "float64")[0].dtype == torch.float64


def test_a_classifier_is_the_same_body_with_a_new_head(chatglm3: Path, loaded: Any):
    form = load_for_task("SEQ_CLS", str(chatglm3), "float32", labels=["no", "yes", "perhaps"])
    assert type(form.model) is GlmForSequenceClassification
    assert form.new_modules == ["score"]
    assert form.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    with torch.no_grad():
        body = form.model.model(IDS).last_hidden_state
        torch.testing.assert_close(body, loaded.model(IDS).last_hidden_state, rtol=0, atol=0)
