"""Every code block of the document that the project implements, run as it stands there.

Its imports from `peft` are imports from `lorakit` here, and arguments that transformers 5 renamed
have their new names; where a block cannot run as it is written, a comment says why. The model is
the tiny one, and only what a tiny model needs is other than in the document (the constants below).
"""

import copy
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lorakit import (
    LoraConfig,
    LoraLinear,
    LoraModel,
    LoraMonitor,
    PeftModel,
    get_peft_model,
    recommended_config,
)

LAYERS = 2  # of the tiny model
ROWS = 32
STEPS = 6  # three epochs of ROWS rows, 4 * 4 rows a step
SAVE_EVERY = 2
LEARNING_RATE = 5e-3  # six steps with 1e-4 hardly move a random model
FALL = 0.1  # nats a token; its output layer is random and frozen, so more is slow to come
MAX_LENGTH = 48
PROMPT = "Order 3: "
TEXT = "Order {number}: {what}"

MINIMAL = ["q_proj", "v_proj"]
STANDARD = ["q_proj", "v_proj", "k_proj", "o_proj"]
COMPLETE = [*STANDARD, "gate_proj", "up_proj", "down_proj"]


# --- 基础LoRA实现: LoRA by hand -----------------------------------------------------------------


class LoRALayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, rank: int = 4, alpha: float = 1):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.lora_A = nn.Parameter(torch.randn(in_features, rank))
        self.lora_B = nn.Parameter(torch.zeros(rank, out_features))
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.lora_A @ self.lora_B) * self.scaling


class LoRALinear(nn.Module):
    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1):
        super().__init__()
        self.original_layer = original_layer
        self.lora = LoRALayer(original_layer.in_features, original_layer.out_features, rank, alpha)
        for param in self.original_layer.parameters():
            param.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.original_layer(x) + self.lora(x)


RANK, ALPHA, D_IN, D_OUT = 4, 8, 24, 40


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def pair(request: pytest.FixtureRequest) -> tuple[LoRALinear, LoraLinear]:
    """The document's layer and lorakit's, with the same weights, neither of them zero."""
    torch.manual_seed(0)
    original = nn.Linear(D_IN, D_OUT, bias=request.param)
    by_hand = LoRALinear(copy.deepcopy(original), RANK, ALPHA)
    ours = LoraLinear(original, r=RANK, lora_alpha=ALPHA)
    A, B = ours.matrices("default")
    with torch.no_grad():
        by_hand.lora.lora_B.normal_()
        A.copy_(by_hand.lora.lora_A.T)  # lorakit stores what nn.Linear stores: (out, in)
        B.copy_(by_hand.lora.lora_B.T)
    return by_hand, ours


def test_the_layer_by_hand_and_ours_give_the_same_output(pair):
    by_hand, ours = pair
    x = torch.randn(3, 5, D_IN)
    torch.testing.assert_close(ours(x), by_hand(x), rtol=1e-5, atol=1e-5)


def test_the_layer_by_hand_and_ours_give_the_same_gradients(pair):
    by_hand, ours = pair
    inputs = [torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1)) for _ in pair]
    for layer, x in zip(pair, inputs, strict=True):
        layer(x.requires_grad_()).square().mean().backward()
    A, B = ours.matrices("default")
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(A.grad, by_hand.lora.lora_A.grad.T, **close)
    torch.testing.assert_close(B.grad, by_hand.lora.lora_B.grad.T, **close)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)


def test_the_layer_by_hand_and_ours_freeze_the_original_and_train_the_rest(pair):
    by_hand, ours = pair
    assert not any(p.requires_grad for p in by_hand.original_layer.parameters())
    assert not any(p.requires_grad for p in ours.base_layer.parameters())
    trained = [sorted(p.numel() for p in m.parameters() if p.requires_grad) for m in pair]
    assert trained[0] == trained[1] == [D_IN * RANK, RANK * D_OUT]


def test_the_layer_by_hand_and_ours_begin_as_the_original_layer():
    torch.manual_seed(0)
    original = nn.Linear(D_IN, D_OUT)
    x = torch.randn(3, D_IN)
    expected = original(x)
    assert torch.equal(LoraLinear(copy.deepcopy(original), r=RANK)(x), expected)
    assert torch.equal(LoRALinear(original, RANK)(x), expected)


# --- 参数量对比: counting parameters ------------------------------------------------------------


@pytest.mark.parametrize(("d", "k", "r"), [(24, 40, 4), (512, 512, 8), (7, 3, 1)])
def test_one_layer_is_reduced_by_the_ratio_of_the_document(d: int, k: int, r: int):
    original_params = d * k
    lora_params = d * r + r * k
    assert lora_params == r * (d + k)
    reduction_ratio = lora_params / original_params
    model = get_peft_model(
        nn.Sequential(nn.Linear(d, k, bias=False)), LoraConfig(r=r, target_modules=["0"])
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert (trainable, total) == (lora_params, original_params + lora_params)
    assert trainable / (total - trainable) == reduction_ratio == r * (d + k) / (d * k)


def adapted_weights(model: LoraModel) -> list[torch.Size]:
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    return [layer.base_layer.weight.shape for layer in layers]


def test_a_model_prints_the_sum_over_its_layers_in_the_familiar_form(tiny_model: Path, capsys):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    frozen = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, document_config())
    capsys.readouterr()
    model.print_trainable_parameters()
    lora_params = sum(model.peft_config["default"].r * (k + d) for k, d in adapted_weights(model))
    assert model.get_nb_trainable_parameters() == (lora_params, frozen + lora_params)
    percent = 100 * lora_params / (frozen + lora_params)
    assert capsys.readouterr().out == (
        f"trainable params: {lora_params:,d} || all params: {frozen + lora_params:,d} || "
        f"trainable%: {percent:.4f}\n"
    )


def test_the_printed_line_has_the_form_of_the_documents(tiny_model: Path, capsys):
    line = "trainable params: 4,194,304 || all params: 6,244,558,848 || trainable%: 0.067"
    capsys.readouterr()
    wrapped(tiny_model).print_trainable_parameters()
    printed = capsys.readouterr().out.strip()
    assert re.sub(r"[\d,.]+", "#", printed) == re.sub(r"[\d,.]+", "#", line)


# --- 使用PEFT库实现: the configuration ----------------------------------------------------------


def document_config(target_modules: list[str] = STANDARD) -> LoraConfig:
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=target_modules,
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    )


def wrapped(tiny_model: Path, target_modules: list[str] = STANDARD) -> LoraModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(model, document_config(target_modules))


def test_every_value_of_the_configuration_arrives_in_the_layers(tiny_model: Path):
    model = wrapped(tiny_model)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == LAYERS * len(STANDARD)
    for layer in layers:
        assert layer.r["default"] == 16
        assert layer.scaling["default"] == 32 / 16
        assert layer.lora_dropout["default"].p == 0.1
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers)
    assert all(
        name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in trained
    )
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_new_adapter_changes_no_answer(tiny_model: Path, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(base, tokenizer)
    assert torch.equal(logits(get_peft_model(base, document_config()).eval(), tokenizer), expected)


@pytest.mark.parametrize("target_modules", [MINIMAL, STANDARD, COMPLETE])
def test_each_list_of_target_modules_adapts_these_modules_and_no_others(
    tiny_model: Path, target_modules: list[str]
):
    model = wrapped(tiny_model, target_modules)
    named = model.get_base_model().named_modules()
    found = [name.split(".")[-1] for name, m in named if isinstance(m, LoraLinear)]
    assert sorted(found) == sorted(target_modules * LAYERS)


# --- 训练流程: training with transformers' own Trainer ------------------------------------------


def prepared(tokenizer: Any, what: str = "apples") -> Dataset:
    # The document leaves the column `instruction` in. With remove_unused_columns=False the
    # collator then meets strings and raises, with PEFT as well.
    def prepare_data(examples):
        inputs = tokenizer(examples["instruction"], truncation=True, padding=True, max_length=512)
        inputs["labels"] = inputs["input_ids"].copy()
        return inputs

    train_data = [{"instruction": TEXT.format(number=n, what=what)} for n in range(ROWS)]
    rows = Dataset.from_list(train_data)
    return rows.map(prepare_data, batched=True, remove_columns=["instruction"])


def trainer_for(model: Any, tokenizer: Any, output_dir: Path, **changed: Any) -> Trainer:
    callbacks = changed.pop("callbacks", None)
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0.1,  # transformers 5 for warmup_ratio
        "logging_steps": 1,
        "save_steps": SAVE_EVERY,
        "eval_strategy": "steps",  # transformers 5 for evaluation_strategy
        "eval_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "remove_unused_columns": False,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return Trainer(
        model=model,
        args=TrainingArguments(**options | quiet | changed),
        train_dataset=prepared(tokenizer),
        eval_dataset=prepared(tokenizer),
        processing_class=tokenizer,  # transformers 5 for tokenizer
        callbacks=callbacks,
    )


def logits(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def by_plain_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter that is not the adapter's, by its name in the plain model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora" not in name
    }


def adapter_values(model: LoraModel) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.adapter_tensors("default").items()}


@dataclass
class Run:
    """What the document's training block leaves behind. Tests copy what they change."""

    model: LoraModel
    trainer: Trainer
    output: Path
    weights: Path
    first_loss: float
    last_loss: float


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    folder = tmp_path_factory.mktemp("run")
    output, weights = folder / "lora_output", folder / "lora_weights"
    model = wrapped(tiny_model)
    trainer = trainer_for(model, tokenizer, output)
    first_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    model.save_pretrained(str(weights))
    last_loss = trainer.evaluate()["eval_loss"]
    model.eval()
    return Run(model, trainer, output, weights, first_loss, last_loss)


def test_prepared_rows_are_padded_to_one_length_and_are_their_own_labels(tokenizer):
    rows = prepared(tokenizer)
    assert set(rows.column_names) >= {"input_ids", "attention_mask", "labels"}
    assert len({len(row) for row in rows["input_ids"]}) == 1
    assert list(rows["labels"]) == list(rows["input_ids"])
    lengths = {sum(row) for row in rows["attention_mask"]}
    assert len(lengths) == 2  # one digit or two: something was padded


def test_trainer_makes_every_step_and_the_loss_falls(run: Run):
    assert run.trainer.state.global_step == STEPS
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert run.last_loss < run.first_loss - FALL


def test_trainer_divides_the_loss_by_all_the_tokens_of_a_step(run: Run):
    # Four accumulated batches are one step: else the first loss would be four times what it is.
    first = next(entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(run.first_loss, rel=0.05)


def test_training_leaves_every_base_weight_as_it_was(run: Run, tiny_model: Path):
    before = by_plain_name(AutoModelForCausalLM.from_pretrained(tiny_model))
    after = by_plain_name(run.model)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_training_moves_every_factor(run: Run, tiny_model: Path):
    before, after = adapter_values(wrapped(tiny_model)), adapter_values(run.model)
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_saved_weights_are_the_adapter_alone(run: Run):
    assert {path.name for path in run.weights.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(run.weights / "adapter_model.safetensors")
    assert saved.keys() == adapter_values(run.model).keys()
    for name, tensor in adapter_values(run.model).items():
        assert torch.equal(saved[name], tensor), name


def test_trainer_keeps_the_last_two_checkpoints(run: Run):
    kept = {path.name for path in run.output.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{STEPS - SAVE_EVERY}", f"checkpoint-{STEPS}"}


def test_a_checkpoint_holds_the_whole_state_which_the_model_takes_back(
    run: Run, tiny_model: Path, tokenizer
):
    # Trainer writes an adapter only where it finds PEFT's own class; docs/peft.md says so.
    folder = run.output / f"checkpoint-{STEPS}"
    files = {path.name for path in folder.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "tokenizer.json"} <= files
    again = wrapped(tiny_model)
    again.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(logits(again, tokenizer), logits(run.model, tokenizer))


def test_a_run_that_was_cut_off_resumes_to_the_very_same_weights(
    run: Run, tiny_model: Path, tokenizer, tmp_path: Path
):
    output = shutil.copytree(run.output, tmp_path / "lora_output")
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    model = wrapped(tiny_model)
    trainer = trainer_for(model, tokenizer, output)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    whole = adapter_values(run.model)
    for name, tensor in adapter_values(model).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.exhaustive
def test_the_best_checkpoint_is_loaded_at_the_end(tiny_model: Path, tokenizer, tmp_path: Path):
    model = wrapped(tiny_model)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # Greater is better: the loss falls, so the first checkpoint is the best and not the last.
    trainer = trainer_for(model, tokenizer, tmp_path, greater_is_better=True, **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert losses[-1] < losses[0]


def test_a_model_with_a_tied_head_is_trained_checkpointed_and_resumed(
    tiny_model: Path, tokenizer, tmp_path: Path
):
    def tied() -> LoraModel:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        base.config.tie_word_embeddings = True
        base.tie_weights()
        assert base.lm_head.weight is base.model.embed_tokens.weight
        return get_peft_model(base, document_config())

    whole = tied()
    trainer_for(whole, tokenizer, tmp_path).train()
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    resumed = tied()
    trainer_for(resumed, tokenizer, tmp_path).train(resume_from_checkpoint=True)
    for name, tensor in adapter_values(resumed).items():
        assert torch.equal(tensor, adapter_values(whole)[name]), name
    base = resumed.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


# --- 模型合并与部署: merging and generating -----------------------------------------------------


@pytest.fixture
def from_files(run: Run, tiny_model: Path) -> LoraModel:
    base_model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return PeftModel.from_pretrained(base_model, str(run.weights))


def test_the_saved_weights_loaded_again_give_the_same_logits(run: Run, from_files, tokenizer):
    assert torch.equal(logits(from_files, tokenizer), logits(run.model, tokenizer))


def test_merging_the_live_model_keeps_its_logits(run: Run, tokenizer):
    expected = logits(run.model, tokenizer)
    merged_model = copy.deepcopy(run.model).merge_and_unload()
    assert not any(isinstance(m, LoraLinear) for m in merged_model.modules())
    torch.testing.assert_close(logits(merged_model, tokenizer), expected, rtol=1e-5, atol=1e-5)


def test_both_ways_to_merge_and_the_saved_model_are_the_same(
    run: Run, from_files, tokenizer, tmp_path: Path
):
    live = logits(copy.deepcopy(run.model).merge_and_unload(), tokenizer)
    merged_model = from_files.merge_and_unload()
    merged_model.save_pretrained(str(tmp_path / "merged_model"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_model")
    assert torch.equal(logits(merged_model, tokenizer), live)
    assert torch.equal(logits(again, tokenizer), live)


def test_a_merged_model_is_the_base_models_own_class_with_its_own_names(
    run: Run, from_files, tiny_model: Path
):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged_model = from_files.merge_and_unload()
    assert type(merged_model) is type(base)
    assert merged_model.state_dict().keys() == base.state_dict().keys()
    changed = {
        name
        for name, weight in merged_model.state_dict().items()
        if not torch.equal(weight, base.state_dict()[name])
    }
    assert {name.split(".")[-2] for name in changed} == set(STANDARD)
    assert len(changed) == LAYERS * len(STANDARD)


def test_a_merged_model_generates_what_the_adapter_beside_it_generates(
    run: Run, from_files, tokenizer
):
    def inference_with_merged_model(text: str, merged_model: Any) -> str:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            outputs = merged_model.generate(
                **inputs, max_length=MAX_LENGTH, temperature=0.7, do_sample=True
            )
        assert outputs.shape[1] <= MAX_LENGTH
        return tokenizer.decode(outputs[0], skip_special_tokens=True)

    merged_model = from_files.merge_and_unload()
    answers = []
    for model in (merged_model, run.model):
        torch.manual_seed(0)
        answers.append(inference_with_merged_model(PROMPT, model))
    assert answers[0] == answers[1]
    assert answers[0].startswith(PROMPT)
    assert len(answers[0]) > len(PROMPT)
    torch.manual_seed(1)
    assert inference_with_merged_model(PROMPT, merged_model) != answers[0]


def test_switching_adapters_gives_each_ones_own_answer(attentive_model, tokenizer, tmp_path: Path):
    base = copy.deepcopy(attentive_model)
    model = None
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = document_config()
        config.init_lora_weights = False  # not zero, as if they were trained
        if model is None:
            model = get_peft_model(attentive_model, config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.eval()
    model.save_pretrained(tmp_path)

    def inference_with_adapter_switching(text: str, adapter_name: str) -> str:
        model.set_adapter(adapter_name)
        inputs = tokenizer(text, return_tensors="pt")
        outputs = model.generate(**inputs, max_length=MAX_LENGTH)
        return tokenizer.decode(outputs[0], skip_special_tokens=True)

    names = ["first", "second", "first"]
    answers = [inference_with_adapter_switching(PROMPT, name) for name in names]
    assert answers[0] == answers[2] != answers[1]
    inputs = tokenizer(PROMPT, return_tensors="pt")
    bare = tokenizer.decode(base.generate(**inputs, max_length=MAX_LENGTH)[0])
    assert bare not in answers
    for name, answer in zip(names, answers, strict=True):
        alone = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        outputs = alone.generate(**inputs, max_length=MAX_LENGTH)
        assert tokenizer.decode(outputs[0], skip_special_tokens=True) == answer


# --- 参数选择策略: settings to begin with -------------------------------------------------------


def get_lora_config_by_task(task_type: str, model_size: str) -> dict[str, int]:
    configs = {
        "classification": {
            "small": {"r": 8, "alpha": 16},
            "medium": {"r": 16, "alpha": 32},
            "large": {"r": 32, "alpha": 64},
        },
        "generation": {
            "small": {"r": 16, "alpha": 32},
            "medium": {"r": 32, "alpha": 64},
            "large": {"r": 64, "alpha": 128},
        },
        "complex_reasoning": {
            "small": {"r": 32, "alpha": 64},
            "medium": {"r": 64, "alpha": 128},
            "large": {"r": 128, "alpha": 256},
        },
    }
    return configs.get(task_type, {}).get(model_size, {"r": 16, "alpha": 32})


@pytest.mark.parametrize("task", ["classification", "generation", "complex_reasoning"])
@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_recommended_settings_are_the_documents(task: str, size: str):
    config = recommended_config(task, size)
    assert {"r": config.r, "alpha": config.lora_alpha} == get_lora_config_by_task(task, size)


@pytest.mark.parametrize(("task", "size"), [("translation", "small"), ("generation", "tiny")])
def test_what_the_table_does_not_have_gets_the_documents_default(task: str, size: str):
    with pytest.warns(UserWarning, match="no '(translation|tiny)'"):
        config = recommended_config(task, size)
    assert {"r": config.r, "alpha": config.lora_alpha} == get_lora_config_by_task(task, size)


# --- 训练监控: watching it learn ----------------------------------------------------------------


def log_gradient_norm(model: nn.Module) -> float:
    total_norm = 0.0
    for name, param in model.named_parameters():
        if param.grad is not None and "lora" in name:
            param_norm = param.grad.data.norm(2)
            total_norm += param_norm.item() ** 2
    return total_norm ** (1.0 / 2)


def log_lora_weight_changes(
    model: nn.Module, initial_weights: dict[str, torch.Tensor]
) -> dict[str, float]:
    changes = {}
    for name, param in model.named_parameters():
        if "lora" in name and name in initial_weights:
            changes[name] = torch.norm(param.data - initial_weights[name]).item()
    return changes


class DocumentsMonitor(TrainerCallback):
    """The document's two functions, called where a Trainer's gradients are still there."""

    def __init__(self, model: LoraModel) -> None:
        self.model = model
        self.initial_weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.history: list[tuple[float, dict[str, float]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        changes = log_lora_weight_changes(self.model, self.initial_weights)
        self.history.append((log_gradient_norm(self.model), changes))


@pytest.fixture(scope="module")
def watched(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoraMonitor, DocumentsMonitor]:
    model, tokenizer = wrapped(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ours, documents = LoraMonitor(), DocumentsMonitor(model)
    trainer = trainer_for(
        *(model, tokenizer, tmp_path_factory.mktemp("watched")),
        callbacks=[ours, documents],
        save_strategy="no",
        eval_strategy="no",
    )
    trainer.train()
    return ours, documents


def test_the_monitor_reports_the_documents_gradient_norm(watched):
    ours, documents = watched
    assert [step for step, _, _ in ours.history] == list(range(1, STEPS + 1))
    found = [total.gradient_norm for _, _, total in ours.history]
    assert found == pytest.approx([norm for norm, _ in documents.history], rel=1e-5)
    assert all(norm > 0 for norm in found)


def test_the_monitor_reports_the_documents_weight_changes(watched):
    ours, documents = watched
    for (_, states, total), (_, changes) in zip(ours.history, documents.history, strict=True):
        assert len(changes) == 2 * len(states)
        for path, state in states.items():
            both = [f"base_model.model.{path}.lora_{f}.default.weight" for f in "AB"]
            expected = math.hypot(*(changes[name] for name in both))
            assert state.weight_change == pytest.approx(expected, rel=1e-5)
        assert total.weight_change == pytest.approx(math.hypot(*changes.values()), rel=1e-5)
    assert ours.history[0][2].weight_change == 0
    assert ours.history[-1][2].weight_change > 0
