"""The classic LoRA script, from loading ChatGLM3-6B to merging and switching, on a small one.

Its two imports, of `peft` and of transformers' Auto classes, are imports from `lorakit` here;
arguments that transformers 5 renamed have their new names.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers import Trainer, TrainingArguments

from chatglm_folders import config, tensors, write_original
from lorakit import AutoModelForCausalLM, AutoTokenizer, LoraConfig, PeftModel, get_peft_model
from plain_chatglm import PlainChatGLM

CHECKPOINT = "chatglm3-6b"
PROMPT = "订单 3: apples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `chatglm3-6b` lies, as the script has it, where the script runs."""
    folder = tmp_path_factory.mktemp("script")
    write_original(folder / CHECKPOINT, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def configuration(target_modules: list[str], r: int = 16) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=target_modules,
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    )


ATTENTION = ["q_proj", "v_proj", "k_proj", "o_proj"]


@pytest.fixture(scope="module")
def trained(place: Path) -> Any:
    """The script up to `save_pretrained`: the model, the tokenizer, and the losses."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("chatglm3-6b")
    tokenizer = AutoTokenizer.from_pretrained("chatglm3-6b", trust_remote_code=True)
    model = get_peft_model(model, configuration(ATTENTION))
    model.print_trainable_parameters()

    train_data = [{"instruction": f"订单 {n}: apples and 苹果"} for n in range(32)]

    def prepare_data(examples: Any) -> Any:
        inputs = tokenizer(examples["instruction"], truncation=True, padding=True, max_length=512)
        inputs["labels"] = inputs["input_ids"].copy()
        return inputs

    train_dataset = Dataset.from_list(train_data)
    train_dataset = train_dataset.map(prepare_data, batched=True, remove_columns=["instruction"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="./lora_output",
            num_train_epochs=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=5e-3,
            warmup_steps=0.1,
            logging_steps=1,
            save_steps=500,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained("./lora_weights")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.eval(), tokenizer, losses


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_the_script_trains(trained: Any):
    model, _, losses = trained
    assert losses[-1] < losses[0] - 0.05
    assert model.get_nb_trainable_parameters()[0] == 2 * 16 * (
        (32 + 32) + 2 * (32 + 16) + (32 + 32)
    )


def test_the_saved_adapter_is_loaded_merged_and_saved_for_plain_transformers(
    trained: Any, place: Path
):
    model, tokenizer, _ = trained
    expected = logits(model, tokenizer)
    base_model = AutoModelForCausalLM.from_pretrained("chatglm3-6b")
    with torch.no_grad():
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        bare = PlainChatGLM(config(), tensors(config()))(ids)[0]
        torch.testing.assert_close(base_model(ids).logits, bare, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, bare, rtol=1e-2, atol=1e-2)
    model = PeftModel.from_pretrained(base_model, "./lora_weights").eval()
    assert torch.equal(logits(model, tokenizer), expected)
    merged_model = model.merge_and_unload()
    merged_model.save_pretrained("./merged_model")
    again = PlainAutoModelForCausalLM.from_pretrained("./merged_model")
    assert again.config.model_type == "glm"
    for one in (merged_model, again):
        torch.testing.assert_close(logits(one, tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert again.generation_config.eos_token_id == [2, 706, 708]


def test_the_merged_model_generates_and_stops_where_chatglm_stops(trained: Any):
    model, tokenizer, _ = trained
    merged_model = copy.deepcopy(model).merge_and_unload()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        outputs = merged_model.generate(**inputs, max_length=48, temperature=0.7, do_sample=True)
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    assert text.strip().startswith(PROMPT)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    merged_model.lm_head.bias = torch.nn.Parameter(torch.eye(768)[user] * 1e4)
    stopped = merged_model.generate(**inputs, max_length=48, do_sample=False)
    assert stopped[0, inputs.input_ids.shape[1] :].tolist() == [user]


@pytest.mark.parametrize(
    ("target_modules", "adapted"),
    [
        (["q_proj", "v_proj"], 4),
        (ATTENTION, 8),
        ([*ATTENTION, "gate_proj", "up_proj", "down_proj"], 12),  # gate and up are one layer
    ],
)
def test_each_of_the_scripts_lists_of_target_modules_is_adapted(
    place: Path, target_modules: list[str], adapted: int
):
    base = AutoModelForCausalLM.from_pretrained("chatglm3-6b")
    model = get_peft_model(base, configuration(target_modules))
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * adapted


def test_adapters_are_switched(place: Path, trained: Any):
    _, tokenizer, _ = trained
    base = AutoModelForCausalLM.from_pretrained("chatglm3-6b")
    model = get_peft_model(base, configuration(ATTENTION, 8), "first")
    model.add_adapter("second", configuration(["q_proj", "v_proj"], 4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    model.eval()

    def answer(adapter_name: str) -> list[int]:
        model.set_adapter(adapter_name)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        return model.generate(**inputs, max_length=40, do_sample=False)[0].tolist()

    first, second = answer("first"), answer("second")
    assert first == answer("first") != second
    with model.disable_adapter():
        assert answer("first") not in (first, second)


def test_peft_runs_the_saved_adapter_on_the_same_base(trained: Any, place: Path):
    model, tokenizer, _ = trained
    base = AutoModelForCausalLM.from_pretrained("chatglm3-6b")
    theirs = peft.PeftModel.from_pretrained(base, "./lora_weights").eval()
    expected = logits(model, tokenizer)
    torch.testing.assert_close(logits(theirs, tokenizer), expected, rtol=1e-4, atol=1e-4)


def test_a_name_that_is_no_chatglm_goes_to_transformers(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert type(model).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer("a").input_ids == AutoTokenizer.from_pretrained(str(tiny_model))("a").input_ids
