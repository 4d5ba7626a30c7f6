"""Sliding windows, chunks, latent attention, linear attention, Mamba, convolutions: row by row.

Prompts are longer than the window, end just before and behind it, and are read in parts; rows come
while others write, and leave before them.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from answered import each_alone, tokens
from layer_kinds import FAMILIES, WINDOW, tiny_config
from lorakit.engine import batch
from lorakit.engine.carried import Carried, how_carried
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.models.row_attention import NAME
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEW = 12
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 30, 11]
ASKED = [
    ([(7 * i + 31 * at + 5) % 256 for i in range(length)], name)
    for at, (length, name) in enumerate(zip(LENGTHS, ["a", "b", None, "a", "b", "a"], strict=True))
]
GREEDY = Sampling(max_new_tokens=NEW, logprobs=0)


def save(family: str, folder: Path) -> Path:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def opened(family: str, folder: Path, **config: Any) -> tuple[Engine, list[list[int]]]:
    """An engine over two adapters, and what `generate` answers to `ASKED` with each alone."""
    base = save(family, folder / "base")
    # Llama 4's routers are linear layers that return two tensors.
    targets = ["q_proj", "o_proj", "gate_proj"] if family == "llama4_text" else "all-linear"
    adapters = {
        name: make_adapter(base, folder / name, seed, target_modules=targets, **config)
        for seed, name in enumerate("ab")
    }
    expected = each_alone(base, adapters, ASKED, NEW)
    return open_engine(str(base), adapters, dtype="float32", max_rows=3), expected


# Windows with sinks, chunks, latent attention, linear attention.
CHOSEN = ["gpt_oss", "llama4_text", "deepseek_v3", "qwen3_next"]


@pytest.mark.parametrize("family", few(FAMILIES.keys(), *CHOSEN))
def test_rows_that_come_and_go_are_answered_as_generate_answers_each_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batch, "CHUNK", 10)
    engine, expected = opened(family, tmp_path)
    with closing(engine):
        assert engine.notices == []
        tickets = [engine.submit(ids, name, GREEDY) for ids, name in ASKED]
        assert [tokens(ticket) for ticket in tickets] == expected
        # The same prompt in the other adapter's hands is another answer.
        ids, _ = ASKED[4]
        others = [tokens(engine.submit(ids, name, GREEDY)) for name in ("a", None)]
    assert len({tuple(answer) for answer in (*others, expected[4])}) > 1


STATES = ["qwen3_next", "granitemoehybrid", "lfm2", "kimi_linear", "jamba", "nemotron_h"]


@pytest.mark.parametrize("family", few(STATES, "granitemoehybrid", "lfm2"))
def test_padding_of_prompts_that_are_read_together_becomes_no_part_of_a_state(
    family: str, tmp_path: Path
):
    engine, expected = opened(family, tmp_path, lora_bias=True)  # it answers zeros too
    with closing(engine):
        assert engine._answers.batch._padded  # type: ignore[attr-defined]
        tickets = [engine.submit(ids, name, GREEDY) for ids, name in ASKED]
        assert [tokens(ticket) for ticket in tickets] == expected


def test_layers_with_a_window_keep_no_more_than_it_holds(tmp_path: Path):
    engine, _ = opened("gemma3_text", tmp_path)
    with closing(engine):
        tokens(engine.submit(ASKED[4][0], None, GREEDY))
        kept = [layer.keys.shape[2] for layer in engine._answers.batch._cache.layers]  # type: ignore[attr-defined]
    assert kept == [WINDOW, 128] * 2


@pytest.mark.parametrize("family", few(["qwen3_next", "mistral"], "mistral"))
def test_a_step_that_fails_midway_leaves_what_rows_have_of_the_past_right(
    family: str, tmp_path: Path
):
    engine, expected = opened(family, tmp_path)
    failed = []

    def fail_once(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if len(given[0]) == 3 and given[0].shape[1] == 1 and len(failed) < 2:
            failed.append(True)
            raise RuntimeError("once")

    with closing(engine):
        # The layers before this one have taken the tokens in by then.
        engine._model.get_submodule("model.layers.2").register_forward_pre_hook(fail_once)
        tickets = [engine.submit(ids, name, GREEDY) for ids, name in ASKED]
        assert [tokens(ticket) for ticket in tickets] == expected
    assert len(failed) == 2


@pytest.mark.parametrize("family", few(FAMILIES.keys(), "jamba", "qwen3_5_text"))
def test_what_a_model_takes_is_seen_in_half_precision_too(family: str):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(torch.bfloat16).eval()
    # The scan of the first Mamba begins at zero whenever it reads more than one token.
    assert how_carried(model) == Carried(in_parts=family not in ("mamba", "falcon_mamba", "jamba"))


@pytest.mark.parametrize(
    ("family", "attention"),
    [("mistral", "sdpa"), ("mistral", "eager"), ("mistral", NAME), ("gemma2", NAME)],
)
def test_windows_are_seen_through_every_attention_on_a_cpu(family: str, attention: str):
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model.set_attn_implementation(attention)
    assert how_carried(model) == Carried()
    assert model.config.sliding_window == WINDOW


def test_a_model_whose_cache_is_not_known_says_so(tmp_path: Path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config("mistral")).eval()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, given: (given[0] * len(given[0]), *given[1:]))
    assert "beside other rows its logits differ" in how_carried(model).why_not
