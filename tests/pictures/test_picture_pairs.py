"""Preference pairs and judged answers with pictures: rows, and loss and gradients as with TRL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from command import run_lorakit
from lorakit import LoraConfig, get_peft_model
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.formats import to_sample
from lorakit.data.masking import IGNORE
from lorakit.data.preference_tokens import tokenize_judged, tokenize_pair, with_mismatched
from lorakit.data.prefixes import in_segments
from lorakit.data.sources import Row
from lorakit.errors import InputError
from lorakit.models.lines import take_lines
from lorakit.models.load import load_for_task
from lorakit.objectives.registry import make_objective
from tiny_pictures import save_pictures, save_tiny_idefics3
from trl_peer import assert_same, in_float64, loss_of_lorakit, loss_of_trl

trl = pytest.importorskip("trl")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_tiny_idefics3(folder / "base")
    save_pictures(folder / "shown")
    return folder


def row(folder: Path, values: dict[str, Any]) -> Row:
    return Row(values, folder / "rows.jsonl", 1)


def conversation(text: str, images: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


SHOWN = [["red"], ["blue", "green"], ["blue"]]


def pairs() -> list[dict[str, Any]]:
    """TRL's form."""
    return [
        {
            "images": [f"shown/{name}-0.png" for name in names],
            "prompt": conversation("which?" * (i + 1), len(names)),
            "chosen": answer(names[0] + "!" * i),
            "rejected": answer("grey" * (3 - i)),
        }
        for i, names in enumerate(SHOWN)
    ]


def test_pairs_have_pictures_in_every_form(folder: Path) -> None:
    kinds = ("preference",)
    picture = str((folder / "shown" / "red-0.png").resolve())
    forms: list[dict[str, Any]] = [
        pairs()[0],
        {"prompt": "<image>which?", "chosen": "red!", "rejected": "grey", "image": picture},
        {
            "messages": [
                {"role": "user", "content": "<image>which?"},
                {"role": "assistant", "content": "red"},
            ],
            "rejected_response": "grey",
            "images": [picture],
        },
        {
            "input": {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "shown/red-0.png"}},
                            {"type": "text", "text": "which?"},
                        ],
                    }
                ]
            },
            "preferred_output": answer("red"),
            "non_preferred_output": answer("grey"),
        },
        {
            "conversations": [{"from": "human", "value": "<image>which?"}],
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "grey"},
            "images": [picture],
        },
        {
            "chosen": [*conversation("which?", 1), *answer("red")],
            "rejected": [*conversation("which?", 1), *answer("grey")],
            "images": [picture],
        },
    ]
    for form in forms:
        sample = to_sample(row(folder, form), {}, kinds)
        wanted = [{"type": "image", "image": picture}, {"type": "text", "text": "which?"}]
        for part in sample.parts:
            assert part.messages[0]["content"] == wanted
            assert part.pictures == [picture]
    for changes, reason in (
        ({"images": []}, "1 place"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "empty"),
        ({"images": ["shown/none.png"]}, "no such picture"),
    ):
        with pytest.raises(InputError, match=reason):
            to_sample(row(folder, pairs()[0] | changes), {}, kinds)


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    with in_float64():
        yield


def test_loss_and_gradients_of_dpo_are_those_of_trl(
    exact: None, folder: Path, tmp_path: Path
) -> None:
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float64", device="cpu")
    rows = [
        tokenize_pair(to_sample(row(folder, one), {}, ("preference",)), loaded.tokenizer, 512)
        for one in pairs()
    ]
    processor = AutoProcessor.from_pretrained(folder / "base")
    # TRL learns what stands behind the end.
    processor.chat_template = processor.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    given = [
        one | {"images": [Image.open(folder / name) for name in one["images"]]} for one in pairs()
    ]
    trainer = trl.DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float64),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=len(given),
            max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=processor,
        peft_config=PeftConfig(task_type="CAUSAL_LM", **LORA),
    )
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            values[name] = parameter.data
    batch = trainer.data_collator([dict(one) for one in given])
    theirs = loss_of_trl(trainer, batch)

    template = loaded.tokenizer.chat_template
    loaded.tokenizer.chat_template = template.replace("<|im_end|>\n", "<|im_end|>")
    rows = [
        tokenize_pair(to_sample(row(folder, one), {}, ("preference",)), loaded.tokenizer, 512)
        for one in pairs()
    ]
    mask = batch["attention_mask"].bool()
    found = [part.input_ids for part in (*(r.parts[0] for r in rows), *(r.parts[1] for r in rows))]
    assert found == [ids[m].tolist() for ids, m in zip(batch["input_ids"], mask, strict=True)]
    model = get_peft_model(loaded.model, LoraConfig(**LORA)).train()
    own = dict(model.named_parameters())
    for name, value in values.items():
        own[name].data = value.clone()
    objective = make_objective("dpo")
    assert take_lines(model) is None
    segments = in_segments([part for one in rows for part in one.parts])
    assert any(segment.parent is not None for segment in segments)
    for collate in (Collator(0), LineCollator(), LineCollator(share_prefixes=True)):
        batch = objective.to_batch(rows, collate)
        if isinstance(collate, LineCollator) and collate.share_prefixes:
            assert batch["pixel_values"].shape[:2].numel() == 4  # of 8 in two answers each
        assert_same(loss_of_lorakit(model, objective, [batch]), theirs)


def test_judged_answers_to_other_pictures_are_answers_to_other_prompts(folder: Path) -> None:
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float64", device="cpu")
    rows = []
    for name, label in (("red", True), ("red", False), ("blue", True)):
        values = {"prompt": "which?", "completion": name, "label": label}
        values["image"] = f"shown/{name}-0.png"
        sample = to_sample(row(folder, values), {}, ("unpaired_preference",))
        rows.append(tokenize_judged(sample, loaded.tokenizer, 512))
    made: Any = with_mismatched(rows, 512)
    answers = [
        loaded.tokenizer.decode([x for x in one.mismatched.labels if x != IGNORE]) for one in made
    ]
    assert [text.split("<")[0] for text in answers] == ["blue", "blue", "red"]
    for one in made:
        assert one.mismatched.pictures.placed == one.pictures.placed
    model = get_peft_model(loaded.model, LoraConfig(**LORA, init_lora_weights=False)).train()
    assert take_lines(model) is None
    objective = make_objective("kto")
    ours = [
        loss_of_lorakit(model, objective, [objective.to_batch(made, collate)])
        for collate in (Collator(0), LineCollator(share_prefixes=True))
    ]
    assert_same(ours[1], ours[0])


def test_a_run_of_dpo_on_pictures_is_trained_and_evaluated(folder: Path, tmp_path: Path) -> None:
    rows = [one for _ in range(2) for one in pairs()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = [f"model={folder / 'base'}", f"data.train={folder / 'rows.jsonl'}", "objective=dpo"]
    words += ["data.eval=0.3", "training.max_steps=2", "samples=1", "output_dir=run"]
    done = run_lorakit(tmp_path, "train", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["padding_free"]
    assert record["data"][0]["pictures_sha256"]
    data = ["--data", folder / "rows.jsonl", "--metrics", "loss", "--limit", "2"]
    done = run_lorakit(tmp_path, "eval", "run", *data)
    assert done.returncode == 0, done.stderr
