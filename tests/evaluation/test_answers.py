"""Batched greedy answers: equal to those given alone, in order, and ended where they should."""

import logging
from typing import Any

import pytest

from answered import generate_answers
from lorakit.engine.sampling import end_tokens, prompt_tokens
from lorakit.errors import InputError

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("hi", "a rather long question, this one", "what is 2 + 2?", "", "b" * 60)
]


def test_a_batched_answer_equals_the_answer_alone(model: Any, tokenizer: Any) -> None:
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]
    assert len(set(alone)) > 3, "the answers must differ, or their order is not tested"
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == alone
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12) == alone


def test_every_batch_is_told_and_the_model_and_tokenizer_are_left_as_they_were(
    model: Any, tokenizer: Any
) -> None:
    model.train()
    side = tokenizer.padding_side
    counts: list[int] = []
    generate_answers(
        model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, on_batch=counts.append
    )
    assert counts == [2, 2, 1]
    assert model.training
    assert tokenizer.padding_side == side


def test_no_prompts_have_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate_answers(model, tokenizer, []) == []


def test_the_models_own_sampling_settings_change_nothing_and_warn_of_nothing(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 0.6, 0.9, 20
    own.repetition_penalty, own.max_length, own.num_beams = 1.9, 4096, 3
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8) == plain
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert [str(warning.message) for warning in recwarn] == []


def test_an_answer_ends_at_the_models_end_token(model: Any, tokenizer: Any) -> None:
    whole = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = ids[3]
    short = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    assert short == tokenizer.decode(ids[: ids.index(ids[3])])  # which is no part of it


def test_the_token_that_the_template_closes_a_turn_with_ends_an_answer_too(
    model: Any, tokenizer: Any
) -> None:
    turn_end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, turn_end]


def test_a_prompt_has_only_the_special_tokens_that_its_template_writes(tokenizer: Any) -> None:
    ids = prompt_tokens(PROMPTS[0], tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_no_room_for_an_answer_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, not 0"):
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=0)
