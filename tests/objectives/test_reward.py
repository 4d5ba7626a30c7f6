"""Reward models: TRL's loss and gradients however rows lie; resumed, read by PEFT, scored."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from test_against_trl import LAYOUTS, PAIRS
from transformers import AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lorakit
from command import run_lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.data.formats import to_sample
from lorakit.data.masking import TokenizedRow
from lorakit.data.sources import Row
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.models.sequence_scores import SequenceScores
from lorakit.objectives.registry import make_objective
from small_runs import lines, recipe, weights
from tiny import byte_tokenizer, make_attentive
from trl_peer import LORA, TEMPLATE, assert_same, exact_norm

ROWS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know" + "." * n}
    for n in range(12)
]
HEADED: dict[str, Any] = LORA | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}


# --- against TRL ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    """transformers' norm in float64 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        yield


def base_of(folder: Path) -> Any:
    """The tiny model with a head of one output, in float64; always the same."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float64
    )
    make_attentive(model)
    return model


@pytest.fixture(scope="module")
def trainer(exact: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's, with an adapter that has learned something, on pairs with margins."""
    trl = pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    args = trl.RewardConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(PAIRS),
        max_length=256,
    )
    made = trl.RewardTrainer(
        model=base_of(tiny_model),
        args=args,
        train_dataset=datasets.Dataset.from_list([p | {"margin": 0.25} for p in PAIRS]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**HEADED),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return made


@pytest.fixture(scope="module")
def ours(trainer: Any, tiny_model: Path) -> LoraModel:
    """The same model, head and adapter, of lorakit."""
    base = base_of(tiny_model)
    model = LoraModel(base, LoraConfig(**HEADED)).double()
    own = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        own[name].data = parameter.data.clone()
    assert take_lines(base) is None
    assert take_prefixes(base)
    return model.train()


def tokens_of(objective: Any, pairs: Sequence[dict[str, Any]]) -> list[TokenizedRow]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    samples = [to_sample(Row(r, Path("f"), 1), {}, objective.row_kinds) for r in pairs]
    return [objective.tokenize(sample, tokenizer, 256) for sample in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("margin", [None, 0.25])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_it_has_trls_loss_and_gradients_however_rows_lie(
    trainer: Any,
    ours: LoraModel,
    layout: str,
    size: int,
    margin: float | None,
    coefficient: float | None,
):
    trainer.args.center_rewards_coefficient = coefficient
    batch = trainer.data_collator([*trainer.train_dataset])
    if margin is None:
        del batch["margin"]
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    objective = make_objective({"type": "reward", "center_rewards_coefficient": coefficient})
    rows = tokens_of(objective, [pair | {"margin": margin} for pair in PAIRS])
    for row, other in zip(rows, trainer.train_dataset, strict=True):
        assert [part.input_ids for part in row.sequences] == [
            other["chosen_ids"],
            other["rejected_ids"],
        ], "the tokens are TRL's"
    forward = objective.forward(ours)
    ours.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for at in range(0, len(rows), size):
        part = objective.loss(forward, objective.to_batch(rows[at : at + size], LAYOUTS[layout]))
        total = total + part.total / len(rows)
    total.backward()
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert any("score" in name for name in own)
    assert_same((total.item(), own), (loss.item(), theirs))


def test_the_score_is_read_where_transformers_reads_it_also_where_the_end_token_pads(
    tiny_model: Path,
):
    """gpt-neox 1285: a reward that is read at another token than the one that was trained."""
    model = base_of(tiny_model).eval()
    objective = make_objective("reward")
    rows = tokens_of(objective, PAIRS)
    assert take_lines(model) is None
    end = byte_tokenizer().eos_token_id
    for pad in (byte_tokenizer().pad_token_id, end):
        model.config.pad_token_id = pad
        wanted = [
            model(input_ids=torch.tensor([part.input_ids])).logits.item()
            for row in rows
            for part in row.sequences
        ]
        reader = SequenceScores(model)
        for name, collate in LAYOUTS.items():
            if name == "padded":
                collate = type(collate)(pad)
            with torch.no_grad():
                found = reader.of_sequences(model, objective.to_batch(rows, collate))
            assert found.tolist() == pytest.approx(wanted, rel=1e-5), (pad, name)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a recipe of two steps of nine rows each in float64."""

    def made(name: str, data: Any = (), **training: Any) -> dict[str, Any]:
        rows = tmp_path / "pairs.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        size = training.get("gradient_accumulation_steps", 1)
        settings = {"max_steps": 2, "per_device_train_batch_size": 9 // size}
        settings |= {"optim": "sgd", "learning_rate": 0.1} | training
        values = recipe(tiny_model, rows, tmp_path / name, **settings)
        values["data"] |= dict(data)
        return values | {"objective": "reward", "dtype": "float64", "samples": 1}

    return made


def test_padded_rows_and_divided_steps_give_what_a_line_gives(make: Any, tmp_path: Path):
    variants: list[tuple[Any, Any]] = [
        ({}, {}),
        ({"padding_free": False}, {}),
        ({}, {"gradient_accumulation_steps": 3}),
        ({"packing": True, "max_length": 400}, {}),
    ]
    found = []
    for i, (data, training) in enumerate(variants):
        result = lorakit.train(make(f"run{i}", data, **training), quiet=True)
        assert result.manifest.padding_free == (data.get("padding_free") is None)
        found.append(weights(result.output_dir))
    assert any("score" in name for name in found[0])
    assert any("lora_B" in name and t.abs().max() > 1e-4 for name, t in found[0].items())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


def test_a_run_records_its_scores_resumes_to_the_same_bytes_and_is_read_by_peft(
    make: Any, tiny_model: Path, tmp_path: Path
):
    settings = {"max_steps": 30, "save_steps": 15, "learning_rate": 0.01, "optim": "adamw_torch"}
    values = make("run", **settings)
    result = lorakit.train(values, quiet=True)
    folder = result.output_dir
    scores = result.manifest.eval_scores
    assert scores is not None
    assert scores["accuracy"] == 1.0
    assert scores["margin"] == pytest.approx(scores["rewards/chosen"] - scores["rewards/rejected"])
    logged = [line for line in lines(folder / "metrics.jsonl") if "margin" in line]
    assert logged[-1]["margin"] > logged[0]["margin"]
    assert not (folder / "samples.json").exists()

    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    for file in (folder / "checkpoint-30").iterdir():
        file.unlink()
    lorakit.train(values, resume=True, quiet=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before

    opened = open_adapter(folder, dtype="float32")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([opened.tokenizer("What is 1 + 1?").input_ids])
    with torch.no_grad():
        ours, other = (m(input_ids=ids).logits.item() for m in (opened.model, theirs))
    assert ours == pytest.approx(other, rel=1e-4)


def test_eval_scores_pairs_beside_the_longer_answer_and_conversations_alone(
    make: Any, tmp_path: Path
):
    """LLaMA-Factory 7212 and 8988: how does one score texts with the model that one has?"""
    lorakit.train(make("run", max_steps=20, learning_rate=0.01, optim="adamw_torch"), quiet=True)
    found = tmp_path / "scores.json"
    exactly = (f"--json={found}", "--dtype=float32")
    done = run_lorakit(tmp_path, "eval", "run", "--data=pairs.jsonl", "--batch-size=5", *exactly)
    assert done.returncode == 0, done.stderr
    pairs = json.loads(found.read_text())
    assert pairs["scores"]["accuracy"]["tuned"] == 1.0
    assert pairs["scores"]["accuracy"]["longer"] == pytest.approx(0.0)
    assert pairs["interval"] == [1.0, 1.0]
    assert len(pairs["scored"]) == 12

    talks = tmp_path / "talks.jsonl"
    talks.write_text(
        "".join(
            json.dumps({"prompt": row["prompt"], "completion": row[name]}) + "\n"
            for row in ROWS
            for name in ("chosen", "rejected")
        )
    )
    done = run_lorakit(tmp_path, "eval", "run", f"--data={talks}", *exactly)
    assert done.returncode == 0, done.stderr
    alone = json.loads(found.read_text())
    scores = [score for one in pairs["scored"] for score in one["scores"]]
    assert [one["scores"][0] for one in alone["scored"]] == pytest.approx(scores, rel=1e-4)
    assert alone["scored"][1]["where"] == "talks.jsonl:2"

    both = tmp_path / "both.jsonl"
    both.write_text(talks.read_text() + json.dumps(ROWS[0]) + "\n")
    done = run_lorakit(tmp_path, "eval", "run", f"--data={both}")
    assert done.returncode == 2
    assert "both.jsonl:25" in done.stderr


@pytest.mark.parametrize("margin", ["much", True, float("nan"), [1]])
def test_a_margin_that_is_no_number_is_named(make: Any, tmp_path: Path, margin: Any):
    values = make("run")
    with pytest.raises(InputError, match=r"data.train:1.*margin"):
        lorakit.train(values, data=[ROWS[0] | {"margin": margin}, *ROWS[1:]], quiet=True)
    assert not (tmp_path / "run").exists()


def test_margins_are_learned_by_reward_models_and_others_say_that_they_are_not(make: Any):
    rows = [row | {"margin": 2.0} for row in ROWS]
    plain = lorakit.train(make("plain"), data=ROWS, quiet=True)
    given = lorakit.train(make("given"), data=rows, quiet=True)
    assert given.eval_loss is not None
    assert plain.eval_loss is not None
    assert given.eval_loss > plain.eval_loss
    dpo = make("dpo") | {"objective": "dpo"}
    lorakit.train(dpo, data=rows, quiet=True)
    record = read_manifest(dpo["output_dir"])
    assert record is not None
    assert any("'margin' of" in notice for notice in record.notices)
