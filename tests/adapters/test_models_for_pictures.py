"""A model for pictures is a base for every verb, by its language part."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import lorakit
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.inspect import inspect
from lorakit.cli.main import main
from lorakit.models.describe import describe
from lorakit.server.options import ServerOptions
from lorakit.server.vllm import VllmOptions, plan
from served import running
from tiny import byte_tokenizer, make_attentive


def save_qwen_vl(folder: Path) -> Path:
    """Writes a random Qwen 2.5 VL with a language part of two layers, and `byte_tokenizer`."""
    torch.manual_seed(0)
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    make_attentive(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_qwen_vl_is_loaded_inspected_merged_and_exported(tmp_path: Path):
    base = save_qwen_vl(tmp_path / "base")
    assert describe(str(base)).tasks == ["CAUSAL_LM"]
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

    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    values["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    values["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    own = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "of-text").mkdir()  # the same for the language part alone, as text models have it
    (tmp_path / "of-text" / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {key.replace("model.language_model.", "model."): tensor for key, tensor in own.items()},
        tmp_path / "of-text" / "adapter_model.safetensors",
    )
    written = []
    for name in ("a", "of-text"):
        export_vllm(tmp_path / name, tmp_path / f"{name}-vllm", base=str(base))
        written.append(load_file(tmp_path / f"{name}-vllm" / "adapter_model.safetensors"))
    assert written[0].keys() == written[1].keys() == own.keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in own)
    served = VllmOptions(
        model=str(base), adapters={"t": tmp_path / "of-text"}, workspace=tmp_path / "copies"
    )
    assert any("modules have other names" in notice for notice in plan(served).notices)
    (copy,) = (tmp_path / "copies").glob("*/adapter_model.safetensors")
    assert load_file(copy).keys() == own.keys()


def test_qwen_vl_is_trained_by_the_command_and_answers_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = save_qwen_vl(tmp_path / "base")
    rows = [f'{{"prompt": "Shelf {i}?", "completion": "K{7 * i}"}}\n' for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    order = "train --model base --data rows.jsonl data.eval=0 dtype=float32 output_dir=run"
    order += " training.max_steps=80 training.learning_rate=0.02 training.save_strategy=no"
    monkeypatch.setattr("sys.argv", ["lorakit", *order.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    with running(base, {"run": tmp_path / "run"}, ServerOptions(port=0), 2) as server:
        messages = [{"role": "user", "content": "Shelf 2?"}]
        reply = server.openai.chat.completions.create(
            model="run", messages=messages, max_tokens=8, temperature=0
        )
        assert reply.choices[0].message.content == "K14"
