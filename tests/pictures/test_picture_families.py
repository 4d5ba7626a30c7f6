"""Families of vision-language models: tiny random ones learn, answer and merge as with PEFT.

The table in docs/images.md is made of what is found here: `LORAKIT_WRITE_TABLES=1 pytest -m ""
tests/pictures/test_picture_families.py -k table` writes it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from lorakit import LoraConfig, LoraModel, get_peft_model
from lorakit.adapters.merge import merge
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.conversations import IMAGE
from lorakit.data.masking import IGNORE, TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.engine.batch import ContinuousBatch
from lorakit.engine.carried import how_carried, why_apart
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.pictures_apart import PicturesApart
from lorakit.engine.sampling import Sampling, prompt_text
from lorakit.errors import InputError
from lorakit.lora.architecture import expert_parameters
from lorakit.lora.parts import PARTS, part_prefixes
from lorakit.lora.routing import Routing
from lorakit.models.lines import Lines
from lorakit.models.load import LoadedModel, load_for_task
from lorakit.models.picture_reader import reader_of, why_unread
from lorakit.objectives.registry import make_objective
from lorakit.training.picture_lines import why_padded
from matrix import few
from picture_families import FAMILIES, PictureFamily
from tiny_pictures import save_pictures, save_tiny
from written_tables import ANEW, WRITING, WrittenTable

TABLE = WrittenTable(
    Path(__file__).parents[2] / "docs" / "images.md",
    "<!-- families: written by tests/pictures/test_picture_families.py -->",
    "<!-- families end -->",
)
TARGETS = f"all-linear[{','.join(PARTS)}]"


@dataclass(frozen=True)
class Adapted:
    """A tiny model of a family with an adapter of all parts, here and in PEFT, in float64."""

    family: PictureFamily
    base: Path
    adapter: Path
    loaded: LoadedModel
    ours: LoraModel
    theirs: nn.Module
    samples: list[Sample]

    @property
    def rows(self) -> list[TokenizedRow]:
        return [tokenize(sample, self.loaded.tokenizer, 512) for sample in self.samples]


def samples(folder: Path) -> list[Sample]:
    """Rows with one picture, with two of two sizes, and without."""
    red, green, blue, _, *wide = map(str, save_pictures(folder / "shown", 2))

    def row(number: int, *shown: str) -> Sample:
        parts: list[dict[str, Any]] = [{"type": IMAGE, IMAGE: one} for one in shown]
        text = f"{number}: which?"
        content: Any = [*parts, {"type": "text", "text": text}] if shown else text
        messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "red"})
        return Sample(messages, None, f"rows:{number}")

    return [row(1, red), row(2, green, wide[2]), row(3), row(4, wide[0]), row(5, blue)]


@contextmanager
def names_as_they_are(model: Any) -> Iterator[None]:
    """Within the block, PEFT takes no names of shared experts for those of routed ones.

    docs/models.md, "Misread by PEFT 0.21", tells of it.
    """
    kind, model.config.model_type = model.config.model_type, "as it is"
    try:
        yield
    finally:
        model.config.model_type = kind


def in_transformers(base: Path, **options: Any) -> Any:
    """The model of transformers' in float64, in which experts have no grouped product."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64, **options)
    plain = model[0] if options else model
    if expert_parameters(plain):
        plain.set_experts_implementation("eager")
    return model


def attends(model: nn.Module, part: str) -> bool:
    """Whether a part of the model has attention; Gemma 3n's vision tower has convolutions."""
    paths = tuple(part_prefixes(model)[part])
    found = (name for name, _ in model.named_modules() if name.startswith(paths))
    return any("attn" in name or "attention" in name for name in found)


def linear_in(model: nn.Module, part: str) -> bool:
    """Whether a part of the model has linear layers; Gemma 3's projector has a bare weight."""
    paths = tuple(part_prefixes(model)[part])
    found = (n for n, module in model.named_modules() if isinstance(module, nn.Linear))
    return any(name.startswith(paths) for name in found)


def loaded_here(base: Path) -> LoadedModel:
    return load_for_task("CAUSAL_LM", str(base), "float64", device="cpu")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What presets say of a family has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=few(list(FAMILIES), "Pixtral", "Qwen3.5"))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("family")
    base = save_tiny(request.param, folder / "base")
    loaded = loaded_here(base)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    ours = get_peft_model(loaded.model, config).train()
    ours.save_pretrained(folder / "adapter")
    plain = in_transformers(base)
    with names_as_they_are(plain):
        theirs = peft.PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True)
    return Adapted(
        FAMILIES[request.param], base, folder / "adapter", loaded, ours, theirs, samples(folder)
    )


def test_a_preset_adapts_the_parts_that_are_named_and_peft_finds_the_same(
    adapted: Adapted,
) -> None:
    there = part_prefixes(adapted.ours.get_base_model())
    for preset in ("all-linear[language]", "all-linear[projector]", "attention[vision]"):
        config = AutoConfig.from_pretrained(adapted.base)
        fresh = AutoModelForImageTextToText.from_config(config)
        part = preset.partition("[")[2].removesuffix("]")
        if not linear_in(fresh, part):
            with pytest.raises(InputError, match="finds nothing in this model"):
                get_peft_model(fresh, LoraConfig(r=2, target_modules=preset))
            continue
        if preset.startswith("attention") and not attends(fresh, part):
            continue
        model = get_peft_model(fresh, LoraConfig(r=2, target_modules=preset))
        found = set(model.targeted_module_names)
        assert found, preset
        assert all(name.startswith(tuple(there[part])) for name in found), preset
        plain = AutoModelForImageTextToText.from_config(config)
        written = peft.LoraConfig(r=2, target_modules=model.peft_config["default"].target_modules)
        with names_as_they_are(plain):
            theirs = peft.get_peft_model(plain, written)
        assert set(theirs.base_model.targeted_module_names) == found, preset


def test_a_pictures_tokens_are_read_and_never_learned(adapted: Adapted) -> None:
    for sample, row in zip(adapted.samples, adapted.rows, strict=True):
        placed = row.pictures.placed if row.pictures else ()
        assert len(placed) == len(sample.pictures)
        assert all(set(row.labels[one.begin : one.end]) == {IGNORE} for one in placed)
        learned = [token for token in row.labels if token != IGNORE]
        assert adapted.loaded.tokenizer.decode(learned) == "red<|im_end|>"


def test_loss_and_gradients_are_those_of_transformers_and_peft(adapted: Adapted) -> None:
    rows, theirs, model = adapted.rows, adapted.theirs.train(), adapted.ours.train()
    batch = Collator(0)(rows)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    theirs.zero_grad()
    logits, labels = theirs(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    wanted_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted_loss.backward()
    wanted = {
        n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora" in n
    }
    objective = make_objective("sft")
    takes_lines = Lines(model).refused is None and why_padded(model, rows) is None
    ways = [(Collator(0), True), (Collator(0), False), *[(LineCollator(), False)] * takes_lines]
    for collate, checkpointed in ways:
        model.zero_grad()
        base = model.get_base_model()
        if checkpointed:
            base.gradient_checkpointing_enable()
        else:
            base.gradient_checkpointing_disable()
        loss = objective.loss(objective.forward(model), objective.to_batch(rows, collate))
        (loss.total / loss.count).backward()
        assert float(loss.total / loss.count) == pytest.approx(float(wanted_loss), rel=1e-9)
        compared = 0
        for name, p in model.named_parameters():
            if "lora" not in name:
                continue
            gradient = wanted[name.replace(".default", "")]
            if gradient is None or p.grad is None:  # a last layer of the tower that nothing reads
                assert p.grad is None or not p.grad.any()
                continue
            allowed = 3e-8 * float(gradient.abs().max()) + 1e-15  # norms round to float32
            assert float((p.grad - gradient).abs().max()) <= allowed, name
            compared += bool(gradient.any())
        assert compared > 8


def test_rows_lie_in_a_line_in_half_precision_where_they_do_in_float32(adapted: Adapted) -> None:
    exact = loaded_here(adapted.base).model
    half = load_for_task("CAUSAL_LM", str(adapted.base), "bfloat16", device="cpu").model
    models: tuple[Any, ...] = (exact, half)
    padded = [Lines(m).refused or why_padded(m, adapted.rows) for m in models]
    assert padded[0] == padded[1]


def test_answers_of_the_engine_are_those_of_generate(adapted: Adapted) -> None:
    tokenizer, theirs = adapted.loaded.tokenizer, adapted.theirs.eval()
    wanted = []
    for sample in adapted.samples:
        row = prompt_row(prompt_text(sample.prompt, tokenizer), sample.prompt, tokenizer)
        own = Collator(0, 1)(
            [TokenizedRow(row.input_ids, row.input_ids, "", pictures=row.pictures)]
        )
        del own["labels"]
        written = theirs.generate(**own, max_new_tokens=6, do_sample=False, eos_token_id=None)
        wanted.append((row, written[0, len(row) :].tolist()))
    fresh = loaded_here(adapted.base)
    engine = Engine(fresh.model, fresh.tokenizer, "base", max_rows=4)
    try:
        engine.pool.register("adapter", adapted.adapter)
        sampling = Sampling(max_new_tokens=6, logprobs=0)
        tickets = [
            engine.submit(row.input_ids, "adapter", sampling, row.pictures) for row, _ in wanted
        ]
        for ticket, (_, tokens) in zip(tickets, wanted, strict=True):
            pieces = list(ticket)
            assert not pieces[-1].error
            found = [one.token for piece in pieces for one in piece.logprobs]
            assert found == tokens[: len(found)]
            assert found
    finally:
        engine.close()


def test_a_merged_model_and_a_reloaded_adapter_are_the_adapted_one(
    adapted: Adapted, tmp_path: Path
) -> None:
    inputs = {k: x for k, x in Collator(0)(adapted.rows).items() if k != "labels"}
    with torch.no_grad():
        expected = adapted.ours.eval()(**inputs).logits
        again = LoraModel.from_pretrained(loaded_here(adapted.base).model, adapted.adapter)
        torch.testing.assert_close(again.eval()(**inputs).logits, expected, rtol=0, atol=0)
    report = merge(adapted.adapter, tmp_path / "merged", base=str(adapted.base), verify=False)
    assert report.modules == len(adapted.ours.targeted_module_names)
    merged, info = in_transformers(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found = merged.eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    tokenizer = loaded_here(tmp_path / "merged").tokenizer
    assert reader_of(tokenizer), why_unread(tokenizer)


def test_a_row_is_not_cut_where_its_first_pictures_would_be_read_in_another_form(
    tmp_path: Path,
) -> None:
    """LLaVA-OneVision cuts a row's only picture into tiles, and none of several."""
    base = save_tiny("LLaVA-OneVision", tmp_path / "base")
    tokenizer = loaded_here(base).tokenizer
    two = samples(tmp_path)[1]
    row = tokenize(two, tokenizer, 512)
    assert row.pictures
    first, second = row.pictures.placed
    assert first.end - first.begin == 17  # a picture of 4 x 4 patches, and the end of its line
    for length in (second.begin, second.end - 1):
        with pytest.raises(InputError, match=r"rows:2: is cut behind 1 of 2 pictures"):
            tokenize(two, tokenizer, length)


def row(adapted: Adapted) -> str:
    """A family's line in the table."""
    model: Any = loaded_here(adapted.base).model
    parts = [
        ", ".join(f"`{path}`" for path in part_prefixes(model)[part])
        + ("" if linear_in(model, part) else " (no linear layer)")
        for part in PARTS
    ]
    batch = how_carried(model).batch(model, Routing(), 2, 64)
    carried = isinstance(batch, ContinuousBatch)
    if isinstance(batch, PicturesApart):
        carried = not why_apart(model, adapted.rows[1])
    beside = "yes" if carried else "by `generate`"
    reason = Lines(model).refused or why_padded(model, adapted.rows) or "yes"
    reason = reason.removeprefix(f"{adapted.family.model} ")
    needs = ", ".join(f"`{name}`" for name in adapted.family.needs) or "–"
    cells = [adapted.family.name, f"`{adapted.family.model}`", *parts, reason, beside, needs]
    return f"| {' | '.join(cells)} |"


def test_the_row_of_the_table_in_the_documents_is_what_was_found(adapted: Adapted) -> None:
    found = row(adapted)
    lines = TABLE.lines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    if not WRITING:
        assert found in lines, ANEW
        assert names == [*FAMILIES]
        return
    by_name = dict(zip(names, lines[2:], strict=True)) | {adapted.family.name: found}
    TABLE.write([*lines[:2], *(by_name[name] for name in FAMILIES if name in by_name)])
