"""Models that read pictures: trained, evaluated and asked as transformers and PEFT do it."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from command import run_lorakit
from lorakit import LoraConfig, get_peft_model
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.dataset import load_samples
from lorakit.data.masking import IGNORE, TokenizedRow, tokenize
from lorakit.engine.conversation import ChatSession
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.sampling import Sampling, prompt_text
from lorakit.engine.shown import shown_text
from lorakit.errors import InputError
from lorakit.lora.parts import part_prefixes
from lorakit.models.lines import Lines
from lorakit.models.load import load_for_task
from lorakit.objectives.registry import make_objective
from lorakit.training.picture_lines import why_padded
from tiny_pictures import COLORS, save_pictures, save_tiny_idefics3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and rows in `rows.jsonl`: with a picture, with two, and without."""
    folder = tmp_path_factory.mktemp("pictures")
    save_tiny_idefics3(folder / "base")
    save_pictures(folder / "shown", 3)
    rows: list[dict[str, Any]] = []
    for i, (name, other) in enumerate(zip(COLORS, [*[*COLORS][1:], "red"], strict=True)):
        one, two = f"shown/{name}-{i % 3}.png", f"shown/{other}-{i % 2}.png"
        rows += [
            {"question": "which color?", "answer": name, "image": one},
            {
                "question": f"{i}: first <image> then <image>?",
                "answer": other,
                "images": [one, two],
            },
            {"question": f"say {name}", "answer": name},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": two}]},
                    {"role": "assistant", "content": other},
                    {"role": "user", "content": [{"type": "image", "path": one}]},
                    {"role": "assistant", "content": name},
                ]
            },
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load_for_task("CAUSAL_LM", str(folder / "base"), "float64", device="cpu")


@pytest.fixture(scope="module")
def rows(folder: Path, loaded: Any) -> list[TokenizedRow]:
    samples = load_samples(folder / "rows.jsonl")
    return [tokenize(sample, loaded.tokenizer, 512) for sample in samples]


def test_rows_are_the_processors_tokens_and_answers_alone_are_learned(
    folder: Path, loaded: Any, rows: list[TokenizedRow]
) -> None:
    processor = AutoProcessor.from_pretrained(folder / "base")
    for sample, row in zip(load_samples(folder / "rows.jsonl"), rows, strict=True):
        text = loaded.tokenizer.apply_chat_template(
            [
                {**m, "content": m["content"]}
                if isinstance(m["content"], list)
                else {**m, "content": [{"type": "text", "text": m["content"]}]}
                for m in sample.messages
            ],
            tokenize=False,
        )
        images = [Image.open(source) for source in sample.pictures]
        wanted = processor(text=[text], images=images or None)["input_ids"][0]
        assert row.input_ids == wanted
        learned = [t for t in row.labels if t != IGNORE]
        answers = [m["content"] for m in sample.messages if m["role"] == "assistant"]
        assert loaded.tokenizer.decode(learned) == "".join(f"{a}<|im_end|>" for a in answers)
        tokens = loaded.tokenizer.convert_tokens_to_ids("<image>")
        placed = row.pictures.placed if row.pictures else ()
        assert sum(t == tokens for t in row.input_ids) == 4 * len(placed) == 4 * len(images)
        for one in placed:
            assert set(row.labels[one.begin : one.end]) == {IGNORE}


def test_a_row_that_is_too_long_is_cut_before_a_picture_and_never_in_it(
    folder: Path, loaded: Any, rows: list[TokenizedRow]
) -> None:
    sample, whole = load_samples(folder / "rows.jsonl")[3], rows[3]
    assert whole.pictures
    second = whole.pictures.placed[1]
    for length in range(second.begin, second.end):
        row = tokenize(sample, loaded.tokenizer, length)
        assert len(row) == second.begin
        assert row.cut == len(whole) - len(row)
        assert row.pictures
        assert len(row.pictures.placed) == 1
    with pytest.raises(InputError, match="the answer begins at token"):
        tokenize(sample, loaded.tokenizer, 5)


def test_loss_and_gradients_are_those_of_transformers_and_peft_padded_and_in_a_line(
    folder: Path, rows: list[TokenizedRow], tmp_path: Path
) -> None:
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float64", device="cpu")
    targets = "all-linear[language,projector,vision]"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(loaded.model, config).train()
    model.save_pretrained(tmp_path / "adapter")
    objective = make_objective("sft")
    base = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    batch = Collator(0)(rows)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = theirs(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    wanted = {
        name.replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert Lines(model).refused is None
    assert why_padded(model, rows) is None
    # What shares a prefix is put together in float32.
    for collate, allowed in (
        (Collator(0), 1e-12),
        (LineCollator(), 1e-12),
        (LineCollator(share_prefixes=True), 1e-6),
    ):
        model.zero_grad()
        loss = objective.loss(objective.forward(model), objective.to_batch(rows, collate))
        (loss.total / loss.count).backward()
        own = {
            name.replace(".default", ""): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        assert own.keys() == wanted.keys()
        assert any("vision_model" in name for name in own)
        for name, gradient in own.items():
            largest = float(wanted[name].abs().max())
            assert float((gradient - wanted[name]).abs().max()) <= allowed * largest, name


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("all-linear", ["text_model"]),
        ("all-linear[language,projector]", ["text_model", "connector"]),
        ("attention[vision]", ["vision_model"]),
    ],
)
def test_a_preset_adapts_the_parts_that_are_named_and_peft_finds_the_same(
    parts: str, words: list[str], loaded: Any, folder: Path
) -> None:
    found = {name: bool(paths) for name, paths in part_prefixes(loaded.model).items()}
    assert found == {"language": True, "projector": True, "vision": True}
    fresh = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu").model
    model = get_peft_model(fresh, LoraConfig(r=2, target_modules=parts))
    own = {n for n, _ in model.named_parameters() if "lora_A" in n}
    assert {
        word for word in ("text_model", "connector", "vision_model") for n in own if word in n
    } == {*words}
    written = model.peft_config["default"].target_modules
    assert "[" not in str(written) or not isinstance(written, str)
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=written))
    assert {n for n, _ in theirs.named_parameters() if "lora_A" in n} == own


def test_answers_to_pictures_are_those_of_generate_with_mixed_adapters(
    folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    for name in ("one", "two"):
        model = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu").model
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu")
    samples = load_samples(folder / "rows.jsonl")[:6]
    tokenizer = loaded.tokenizer
    wanted = {}
    for name in ("one", "two"):
        base = AutoModelForImageTextToText.from_pretrained(folder / "base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / name).eval()
        for i, sample in enumerate(samples):
            text = prompt_text(sample.prompt, tokenizer)
            row = prompt_row(text, sample.prompt, tokenizer)
            batch = Collator(0, 1)(
                [TokenizedRow(row.input_ids, row.input_ids, "", pictures=row.pictures)]
            )
            del batch["labels"]
            written = theirs.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
            wanted[name, i] = written[0, len(row) :].tolist()
    engine = Engine(loaded.model, tokenizer, "base", max_rows=4)
    try:
        for name in ("one", "two"):
            engine.pool.register(name, tmp_path / name)
        tickets = {}
        for i, sample in enumerate(samples):
            for name in ("one", "two"):
                text = shown_text(sample.prompt, tokenizer)
                row = prompt_row(text, sample.prompt, tokenizer)
                sampling = Sampling(max_new_tokens=8, logprobs=0)
                tickets[name, i] = engine.submit(row.input_ids, name, sampling, row.pictures)
        for key, ticket in tickets.items():
            tokens = [one.token for piece in ticket for one in piece.logprobs]
            assert tokens == wanted[key][: len(tokens)]
            assert tokens
    finally:
        engine.close()


def test_a_chat_shows_a_picture_with_the_next_message(folder: Path) -> None:
    loaded = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu")
    engine = Engine(loaded.model, loaded.tokenizer, "base", max_rows=1)
    try:
        chat = ChatSession(engine, sampling=Sampling(max_new_tokens=4))
        assert "no such picture" in str(chat.command("/image nowhere.png"))
        assert "not a picture" in str(chat.command(f"/image {folder / 'rows.jsonl'}"))
        chat.command(f"/image {folder / 'shown' / 'red-0.png'}")
        shown = "".join(chat.answer("which?"))
        chat.reset()
        chat.command(f"/image {folder / 'shown' / 'blue-0.png'}")
        assert "".join(chat.answer("which?")) or shown
        assert [m["role"] for m in chat.history] in ([], ["user", "assistant"])
    finally:
        engine.close()


def test_a_run_on_pictures_is_trained_evaluated_generated_and_merged(
    folder: Path, tmp_path: Path
) -> None:
    recipe = {
        "model": str(folder / "base"),
        "dtype": "float32",
        "data": {"train": "rows.jsonl", "eval": 0.25, "media_dir": str(folder)},
        "lora": {"r": 4},
        "training": {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2},
        "samples": 1,
        "output_dir": "run",
    }
    (tmp_path / "rows.jsonl").write_text((folder / "rows.jsonl").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = run_lorakit(tmp_path, "train", "recipe.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["padding_free"]
    assert record["data"][0]["pictures_sha256"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert "connector" in config["target_modules"]
    prompts = [{"prompt": "which color?", "image": str(folder / "shown" / "red-0.png")}]
    (folder / "prompts.jsonl").write_text(json.dumps(prompts[0]) + "\n")
    command = ["generate", "run", "--prompts", folder / "prompts.jsonl", "--max-new-tokens", "4"]
    done = run_lorakit(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 20
    done = run_lorakit(
        tmp_path,
        "eval",
        "run",
        "--data",
        "rows.jsonl",
        "--metrics",
        "loss",
        "--limit",
        "5",
    )
    assert done.returncode == 0, done.stderr
    done = run_lorakit(tmp_path, "merge", "run", "-o", "merged")
    assert done.returncode == 0, done.stderr
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"


REFUSED = {
    "a broken picture": ({"image": "shown/broken.png"}, "the picture broken.png is damaged"),
    "a missing picture": ({"image": "shown/no.png"}, "no such picture"),
    "the image token in a text": (
        {"question": "is <image> a mark?", "image": "shown/red-0.png", "system": "see <image>"},
        "1 picture in its columns and 2 places",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_refuses_a_bad_picture_before_it_begins(
    case: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "shown" / "broken.png").write_bytes(
        (folder / "shown" / "red-2.png").read_bytes()[:60]
    )
    changes, reason = REFUSED[case]
    file = folder / "refused.jsonl"
    rows = [{"question": "which?", "answer": "red"}, {"question": "?", "answer": "red", **changes}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = str(folder / "base")
    done = run_lorakit(tmp_path, "train", f"model={base}", f"data.train={file}", "output_dir=out")
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert "refused.jsonl:2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_of_text_alone_refuses_pictures_and_a_recipe_refuses_parts_it_does_not_have(
    folder: Path, tmp_path: Path
) -> None:
    from tiny import save_tiny_model

    base = save_tiny_model(tmp_path / "text")
    given = f"data.train={folder / 'rows.jsonl'}"
    done = run_lorakit(tmp_path, "train", f"model={base}", given, "output_dir=out")
    assert done.returncode == 2
    assert "the model reads text alone" in done.stderr
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "a"}\n' * 9)
    given = f"data.train={tmp_path / 'rows.jsonl'}"
    for parts, reason in (
        ("[vision]", "no part 'vision'"),
        ("[visoin]", "did you mean 'vision'"),
        ("vision", "should be a list"),
    ):
        words = [f"model={base}", given, "data.eval=0", f"lora.parts={parts}", "output_dir=out"]
        done = run_lorakit(tmp_path, "train", *words)
        assert done.returncode == 2
        assert reason in done.stderr, done.stderr
