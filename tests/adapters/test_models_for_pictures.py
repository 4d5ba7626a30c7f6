"""A model for pictures is a base for every verb, by its language part."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import lorakit
from lorakit.adapters.inspect import inspect
from lorakit.inference.open import open_engine
from tiny import byte_tokenizer


def test_qwen_vl_is_loaded_inspected_merged_and_served(tmp_path: Path):
    torch.manual_seed(0)
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model, _ = lorakit.load_model(base, "float32")
    wishes = lorakit.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    lorakit.get_peft_model(model, wishes).save_pretrained(tmp_path / "a")
    fit = inspect(tmp_path / "a", base=str(base)).fit
    assert fit is not None
    assert fit.fits, fit.reason
    report = lorakit.merge(tmp_path / "a", tmp_path / "merged", base=str(base))
    assert (report.modules, report.passed, report.streamed) == (14, True, True)
    engine = open_engine(str(base), {"a": tmp_path / "a"})
    try:
        assert [info.name for info in engine.pool.infos()] == ["a"]
    finally:
        engine.close()
