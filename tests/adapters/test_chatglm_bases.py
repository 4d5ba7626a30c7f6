"""Every verb takes a base in ChatGLM's original layout, and writes transformers' own."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from chatglm_folders import write_original
from command import run_lorakit
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.merge import merge
from lorakit.adapters.open import open_adapter
from lorakit.errors import InputError
from lorakit.models.layouts.convert import convert
from lorakit.server.options import ServerOptions
from lorakit.server.vllm import VllmOptions, plan
from plain_adapters import save_adapter
from served import running

IDS = torch.arange(3, 60)[None] * 11 % 700


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_original(tmp_path_factory.mktemp("original") / "model", dtype=torch.bfloat16)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def adapter(chatglm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_adapter(chatglm, folder, target_modules="all-linear", task_type="CAUSAL_LM")


def test_a_merge_file_by_file_is_that_in_memory_and_loads_with_plain_transformers(
    chatglm: Path, adapter: Path, tmp_path: Path
):
    streamed = merge(adapter, tmp_path / "streamed", dtype="float32")
    in_memory = merge(adapter, tmp_path / "in memory", dtype="float32", in_memory=True)
    assert streamed.streamed
    assert not in_memory.streamed
    assert streamed.passed
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("streamed", "in memory")
    ]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    opened = open_adapter(adapter, dtype="float32")
    with torch.no_grad():
        expected = opened.model.eval()(IDS).logits
        torch.testing.assert_close(models[0](IDS).logits, expected, rtol=1e-4, atol=1e-4)
    files = {path.name for path in (tmp_path / "streamed").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= files
    assert not files & {"modeling_chatglm.py", "tokenizer.model"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "streamed")
    assert tokenizer("低秩").input_ids == opened.tokenizer("低秩").input_ids


def test_a_merge_keeps_the_dtype_of_the_original_files(adapter: Path, tmp_path: Path):
    report = merge(adapter, tmp_path / "merged", verify=False)
    assert report.dtype == "bfloat16"
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.self_attn.q_proj.bias" in index["weight_map"]
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "merged" / file, "pt") as opened:
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_converted_model_is_the_same_base(chatglm: Path, adapter: Path, tmp_path: Path):
    native = tmp_path / "native"
    convert(chatglm, native)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of other weights
        opened = open_adapter(adapter, base=str(native), dtype="float32")
    direct = open_adapter(adapter, dtype="float32")
    with torch.no_grad():
        assert torch.equal(opened.model.eval()(IDS).logits, direct.model.eval()(IDS).logits)


def test_a_base_of_bin_files_is_merged_after_it_was_converted(tmp_path: Path):
    base = write_original(tmp_path / "base", form="bin")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    with pytest.raises(
        InputError, match=r"lorakit convert .*base -o DIR, and give DIR as the base model"
    ):
        merge(adapter, tmp_path / "merged")
    convert(base, tmp_path / "native")
    report = merge(adapter, tmp_path / "merged", base=str(tmp_path / "native"))
    assert report.passed
    assert report.streamed


def test_vllm_is_given_the_converted_base(chatglm: Path, adapter: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"lorakit convert .* -o DIR, and give --base DIR"):
        export_vllm(adapter, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    convert(chatglm, tmp_path / "native")
    report = export_vllm(adapter, tmp_path / "served", base=str(tmp_path / "native"))
    assert report.command.startswith(f"vllm serve {tmp_path / 'native'} ")


def test_chat_and_generate_answer_with_an_original_base(
    chatglm: Path, adapter: Path, tmp_path: Path
):
    (tmp_path / "asked.txt").write_text("hello\n你好\n", encoding="utf-8")
    short = ("--max-new-tokens", "4", "--dtype", "float32")
    done = run_lorakit(
        tmp_path, "generate", adapter, "--prompts", "asked.txt", "--with-base", *short
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["model"] for answer in answers] == ["adapter", str(chatglm)] * 2
    chatted = run_lorakit(tmp_path, "chat", adapter, *short, stdin="hello\n")
    assert chatted.returncode == 0, chatted.stderr
    assert answers[0]["messages"][-1]["content"].strip() in chatted.stdout


def test_a_server_answers_with_an_original_base_as_the_adapter_does(chatglm: Path, adapter: Path):
    opened = open_adapter(adapter, dtype="float32")
    ids = opened.tokenizer("你好", return_tensors="pt").input_ids
    with torch.no_grad():
        written = opened.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    # Token by token: random bytes are no text, and how they show depends on their neighbours.
    expected = [opened.tokenizer.decode([token]) for token in written[0, ids.shape[1] :]]
    with running(chatglm, {"shop": adapter}, ServerOptions(port=0), max_rows=2) as server:
        reply = server.complete(prompt="你好", logprobs=0).json()
    assert reply["choices"][0]["logprobs"]["tokens"] == expected


def test_serving_with_vllm_asks_for_the_converted_base(
    chatglm: Path, adapter: Path, tmp_path: Path
):
    options = VllmOptions(adapters={"shop": adapter}, workspace=tmp_path / "copies")
    with pytest.raises(InputError, match=r"lorakit convert .* -o DIR, and give --model DIR"):
        plan(options)
    convert(chatglm, tmp_path / "native")
    command = plan(replace(options, model=str(tmp_path / "native"))).command
    assert command[2] == str(tmp_path / "native")


def test_an_id_of_the_hub_means_the_original_folder_in_the_cache(
    chatglm: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached = tmp_path / "hub" / "models--THUDM--chatglm3-6b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    shutil.copytree(chatglm, cached / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    id_ = "THUDM/chatglm3-6b"
    with pytest.raises(InputError, match=f"lorakit convert {id_} -o DIR, and give --base DIR"):
        export_vllm(adapter, tmp_path / "served", base=id_)
    options = VllmOptions(model=id_, adapters={"shop": adapter}, workspace=tmp_path / "copies")
    with pytest.raises(InputError, match=f"lorakit convert {id_} -o DIR, and give --model DIR"):
        plan(options)


def test_training_evaluating_and_inspecting_take_the_original_folder(chatglm: Path, tmp_path: Path):
    rows = [{"prompt": f"订单 {n}?", "completion": f"苹果 {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    done = run_lorakit(
        tmp_path,
        *("train", f"model={chatglm}", "data.train=rows.jsonl", "output_dir=run"),
        *("training.max_steps=2", "training.per_device_train_batch_size=4"),
        "lora.target_modules=[q_proj,v_proj,gate_proj,up_proj]",
    )
    assert done.returncode == 0, done.stderr
    (said_of_it,) = [line for line in done.stderr.splitlines() if "gate_proj" in line]
    assert said_of_it.startswith("notice: gate_proj, up_proj are one layer in this model")
    for verb in (
        ("eval", "run", "--data", "rows.jsonl", "--limit", "2"),
        ("inspect", "run"),
        ("merge", "run", "-o", "merged", "--dtype", "float32"),
        ("export", "run", "--to", "chatglm", "-o", "named"),
    ):
        said = run_lorakit(tmp_path, *verb)
        assert said.returncode == 0, (verb, said.stderr)
    model, tokenizer = lorakit.load_model(str(tmp_path / "merged"))
    assert model.config.model_type == "glm"
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 706
