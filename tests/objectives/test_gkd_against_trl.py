"""Distillation's loss, gradients and sampled answers are those of TRL's GKD trainer, to 1e-9.

TRL's batch goes through its `compute_loss` on two PEFT models in float64, student and teacher; the
same tokens are given to lorakit, where both are adapters of one model.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import RowWithSecond, TokenizedRow
from lorakit.engine.sampling import end_tokens
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.objectives.distill import Distill
from lorakit.objectives.forward import TEACHER
from lorakit.rl.rollouts import Rollouts
from tiny import byte_tokenizer, make_attentive
from trl_peer import LORA, TEMPLATE, assert_same, exact_norm, loss_of_lorakit, loss_of_trl

pytest.importorskip("trl")
from trl.experimental.gkd import GKDConfig, GKDTrainer

TAUGHT: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} + {n}? " * (1 + n % 3)},
            {"role": "assistant", "content": f"It is {2 * n}." + "!" * (3 * n)},
        ]
    }
    for n in range(4)
]
PAD = 258


def fill(model: Any, seed: int) -> None:
    """Gives the factors of an adapter values, as if it had learned something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.1 * values


@pytest.fixture(scope="module")
def gkd(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL's trainer, in float64 throughout."""

    def attentive() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
        make_attentive(model)
        return model

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    teacher = get_peft_model(attentive(), PeftConfig(task_type="CAUSAL_LM", **TAUGHT))
    fill(teacher, 2)
    args = GKDConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(ROWS),
        max_length=256,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        trainer = GKDTrainer(
            model=attentive(),
            teacher_model=teacher,
            args=args,
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=PeftConfig(**LORA),
        )
        fill(trainer.model, 1)
        yield trainer


@pytest.fixture(scope="module")
def ours(gkd: Any, tiny_model: Path) -> LoraModel:
    """The same model with both adapters, of lorakit."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    make_attentive(base)
    model = LoraModel(base, LoraConfig(**LORA))
    model.add_adapter(TEACHER, LoraConfig(**TAUGHT))
    model.double().set_adapter("default")
    own = dict(model.named_parameters())
    for name, parameter in gkd.model.named_parameters():
        if "lora_" in name:
            own[name].data = parameter.data.clone()
    for name, parameter in gkd.teacher_model.named_parameters():
        if "lora_" in name:
            own[name.replace(".default.", f".{TEACHER}.")].data = parameter.data.clone()
    assert take_lines(base) is None
    assert take_prefixes(base)
    return model.train()


def rows_of(batch: dict[str, torch.Tensor]) -> list[RowWithSecond]:
    """The tokens of TRL's batch; its teacher reads what its student reads."""
    rows = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        row = TokenizedRow(ids[mask].tolist(), labels[mask].tolist(), "rows:1")
        rows.append(RowWithSecond.of(row, row))
    return rows


def padded_right(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TRL's batch, padded on the right: positions are rounded to float32 in rotary embeddings."""
    batch = dict(batch)
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    for name in ("input_ids", "labels", "attention_mask"):
        batch[name] = batch[name].gather(1, order)
    return batch


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    rows = trainer.train_dataset
    return padded_right(trainer.data_collator([rows[i] for i in range(len(rows))]))


@pytest.mark.parametrize("layout", ["line", "padded"])
@pytest.mark.parametrize(
    ("beta", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.2, 0.7), (1.0, 1.0), (1.0, 2.0)]
)
def test_loss_and_gradients_are_trls(
    beta: float, temperature: float, layout: str, gkd: Any, ours: LoraModel
):
    gkd.beta = beta
    gkd.generalized_jsd_loss = partial(GKDTrainer.generalized_jsd_loss, temperature=temperature)
    batch = batch_of(gkd)
    theirs = loss_of_trl(gkd, batch)
    objective = Distill(teacher="unread", beta=beta, temperature=temperature)
    collate = LineCollator(share_prefixes=True) if layout == "line" else Collator(PAD)
    rows = rows_of(batch)
    for size in (4, 1):
        parts = [objective.to_batch(rows[i : i + size], collate) for i in range(0, 4, size)]
        assert_same(loss_of_lorakit(ours, objective, parts), theirs)


def test_top_k_of_all_classes_but_one_is_trls_loss(gkd: Any, ours: LoraModel):
    gkd.beta = 0.5
    gkd.generalized_jsd_loss = GKDTrainer.generalized_jsd_loss
    batch = batch_of(gkd)
    theirs = loss_of_trl(gkd, batch)
    objective = Distill(teacher="unread", beta=0.5, temperature=1.0, top_k=258)
    parts = [objective.to_batch(rows_of(batch), Collator(PAD))]
    assert_same(loss_of_lorakit(ours, objective, parts), theirs)


def test_sampled_answers_and_their_loss_are_trls(gkd: Any, ours: LoraModel):
    """Greedily, as random numbers are drawn in another order."""
    gkd.beta = 0.5
    gkd.generalized_jsd_loss = GKDTrainer.generalized_jsd_loss
    batch = batch_of(gkd)
    tokenizer = gkd.processing_class
    ends = end_tokens(ours.get_base_model(), tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=PAD
    )
    gkd.model.eval()
    with torch.no_grad():
        made = gkd.generate_on_policy_outputs(gkd.model, batch, greedy)
    sampled = dict(zip(("input_ids", "attention_mask", "labels"), made, strict=True))
    theirs = loss_of_trl(gkd, padded_right(sampled))
    coldest = Distill(teacher="unread", lmbda=1.0, temperature=1e-6, max_new_tokens=8)
    objective = Distill(teacher="unread", temperature=1.0)

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        return objective.to_batch(rows, LineCollator(share_prefixes=True))

    student = Rollouts(coldest, tokenizer, collate)
    [own] = student.put_into([collate(rows_of(batch))], ours, step=0)
    found = [answer[1:] for answer in own["labels"].tolist()]
    wanted = [label for row in sampled["labels"].tolist() for label in row if label != -100]
    assert sorted(x for row in found for x in row if x != -100) == sorted(wanted)
    assert ours.training
    assert_same(loss_of_lorakit(ours, objective, [own]), theirs)
