"""The decoding step in C++, beside the one by PyTorch."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lorakit.engine.cache import row_cache
from lorakit.engine.decode_step import DecodeStep
from lorakit.engine.native.library import Library, library
from lorakit.engine.resident import ResidentModel
from lorakit.engine.sampling import Sampling
from lorakit.lora import LoraConfig
from lorakit.lora.routing import BASE, Route
from lorakit.models.rounding import WEIGHTS, stored_as
from matrix import few

SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, PreTrainedConfig] = {
    "tiles fit": LlamaConfig(
        **SIZES, hidden_size=64, intermediate_size=96, vocab_size=160, tie_word_embeddings=True
    ),
    "blocks fit": LlamaConfig(
        **SIZES, hidden_size=128, intermediate_size=192, vocab_size=160, mlp_bias=True
    ),
    "no size is round, biases": LlamaConfig(
        **SIZES,
        hidden_size=40,
        head_dim=16,
        intermediate_size=70,
        vocab_size=101,
        attention_bias=True,
        mlp_bias=True,
    ),
    "qwen2": Qwen2Config(**SIZES, hidden_size=64, intermediate_size=96, vocab_size=99),
    "qwen3": Qwen3Config(
        **SIZES, hidden_size=48, head_dim=80, intermediate_size=64, vocab_size=130
    ),
}
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS: dict[str, list[str]] = {
    "the base": [BASE],
    "an adapter": ["wide"] * 3,
    "several": ["odd", BASE, "wide", "odd", "wide"],
    "more than a tile": ["wide", "odd", BASE] * 13,
}


def resident_of(
    config: PreTrainedConfig, dtype: torch.dtype, weights: str | None = None
) -> ResidentModel:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in base.parameters():  # biases and norms are zeros and ones at first
        parameter.data += 0.05 * torch.randn_like(parameter)
    resident = ResidentModel(stored_as(base, weights), stays_wrapped=True)
    resident.pack()
    for seed, (name, rank) in enumerate({"odd": 3, "wide": 19}.items()):
        resident.create(name, LoraConfig(r=rank, target_modules=TARGETS), seed)
        for tensor in resident.trained(name).values():
            tensor.data.normal_(std=0.1)
    resident.pack(["odd", "wide"])
    return resident


def both_ways(resident: ResidentModel, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of three steps (3, rows, vocabulary), in C++ and by PyTorch."""
    if library().functions is None:
        pytest.skip(library().why_not)
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    assert step.native is not None
    route, routing = Route.of_rows(names, (len(names), 1)), resident.model.routing
    prompts = [[5 + i, 6, 7, 8, 9, 10][: 1 + i % 6] for i in range(len(names))]
    native, found = step.native, []
    with torch.inference_mode():
        for own in (native, None):
            step.native = own
            cache = row_cache(base, rows=len(names), length=40)
            forward: Any = base
            for row, prompt in enumerate(prompts):  # alone, so that they are the same among others
                routing.route = Route.of_rows([names[row]])
                forward(**cache.whole_prompts(row, [prompt], base.device))
            routing.route = route
            logits = []
            for i in range(25):  # past the 16 keys that are read at a time
                lengths = [len(prompt) + i for prompt in prompts]
                given = cache.newest_tokens([11 + i] * len(names), lengths, base.device)
                assert step.serves(route, packed)
                logits.append(step(cache, given, route, packed).clone())
            found.append(torch.stack([logits[0], logits[1], logits[-1]]))
    assert step.native is None
    step.native = native
    return found[0], found[1]


@pytest.mark.parametrize("names", few(ROWS, "several"))
@pytest.mark.parametrize("config", few(MODELS, "tiles fit", "no size is round, biases"))
def test_float32_is_pytorchs_step_to_rounding(config: PreTrainedConfig, names: list[str]):
    found, expected = both_ways(resident_of(config, torch.float32), names)
    assert not torch.equal(found, expected)  # it is another function
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("names", few(ROWS, "several", "more than a tile"))
@pytest.mark.parametrize("config", few(MODELS, "tiles fit", "qwen3"))
def test_bfloat16_is_pytorchs_step_to_rounding(config: PreTrainedConfig, names: list[str]):
    found, expected = both_ways(resident_of(config, torch.bfloat16), names)
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    assert off < 0.02
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("names", few(ROWS, "several", "the base", "more than a tile"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rounded_weights_are_multiplied_as_they_are(
    weights: str, dtype: torch.dtype, names: list[str]
):
    found, expected = both_ways(resident_of(MODELS["blocks fit"], dtype, weights), names)
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    assert off < (0.02 if dtype == torch.bfloat16 else 0.005)  # PyTorch rounds what it unpacks


def read_both_ways(resident: ResidentModel, names: list[str]) -> list[tuple[torch.Tensor, ...]]:
    """What C++ makes of prompts that are read in three parts, and what the model's own forward
    does: the logits of each part (rows, vocabulary), and the keys. The first place stays empty.
    """
    if library().functions is None:
        pytest.skip(library().why_not)
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    prompts = [[(7 * row + i) % 90 for i in range(3 + 5 * row % 17)] for row in range(len(names))]
    starts = [len(prompt) + 3 for prompt in prompts]
    forward, device = base, base.device

    def by_cpp(given: dict[str, Any], own: list[str]) -> torch.Tensor | None:
        route = Route.of_rows(own, tuple(given["input_ids"].shape))
        assert step.serves(route, packed)
        return step.of_prompts(cache, given, route, packed)

    def by_model(given: dict[str, Any], own: list[str]) -> torch.Tensor:
        resident.model.routing.route = Route.of_rows(own, tuple(given["input_ids"].shape))
        return forward(**given, logits_to_keep=1).logits[:, -1]

    found = []
    for read in (by_cpp, by_model):
        cache = row_cache(base, rows=1 + len(names), length=60)
        with torch.inference_mode():
            logits = [read(cache.whole_prompts(1, prompts, device), names)]
            for row, name in enumerate(names, 1):
                part = cache.part_of_row(row, [3, 1, 4], len(prompts[row - 1]), device)
                logits.append(read(part, [name]))
            rests = [[20 + row] * (1 + row % 7) for row in range(len(names))]
            logits.append(read(cache.rests_of_prompts(1, rests, starts, device), names))
            keys = [layer.keys[1:, :, : min(starts)] for layer in cache.layers]
        found.append((*logits, *keys))
    return found


@pytest.mark.parametrize("names", few(ROWS, "several"))
@pytest.mark.parametrize("config", few(MODELS, "tiles fit", "no size is round, biases"))
def test_prompts_and_their_parts_are_read_as_by_the_model(
    config: PreTrainedConfig, names: list[str]
):
    by_cpp, by_model = read_both_ways(resident_of(config, torch.float32), names)
    assert not torch.equal(by_cpp[0], by_model[0])  # it is another function
    for found, expected in zip(by_cpp, by_model, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("weights", [None, *WEIGHTS])
@pytest.mark.parametrize("names", few(ROWS, "several"))
def test_prompts_in_bfloat16_are_read_as_by_the_model(names: list[str], weights: str | None):
    resident = resident_of(MODELS["blocks fit"], torch.bfloat16, weights)
    for found, expected in zip(*read_both_ways(resident, names), strict=True):
        off = (found.float() - expected.float()).norm() / expected.float().norm()
        assert off < 0.02


def test_prompts_of_any_short_length_are_read_in_one_step_and_as_each_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    if library().functions is None:
        pytest.skip(library().why_not)
    resident, names = resident_of(MODELS["tiles fit"], torch.bfloat16), ["wide", "odd", BASE]
    prompts = [[5, 6, 7], [*range(20, 50)], [*range(9)]]
    read: list[int] = []
    call = DecodeStep.of_prompts

    def answers(numbers: range) -> list[list[int]]:
        drawn = Sampling(1.0, max_new_tokens=8, seed=3 + numbers[0])
        asked = [prompts[i] for i in numbers], [names[i] for i in numbers]
        return [one.tokens for one in resident.sample(*asked, drawn, ends=())]

    alone = [answers(range(i, i + 1))[0] for i in range(3)]

    def noted(*given: Any, **asked: Any) -> torch.Tensor | None:
        found = call(*given, **asked)
        assert found is not None
        read.append(len(found))
        return found

    monkeypatch.setattr(DecodeStep, "of_prompts", noted)
    assert answers(range(3)) == alone
    assert read == [3]


def test_every_token_of_a_draft_is_judged_as_by_the_model():
    resident = resident_of(MODELS["tiles fit"], torch.float32)
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    if library().functions is None:
        pytest.skip(library().why_not)
    assert step is not None
    names, drafts, found = ["wide", BASE, "odd"], [[3, 1, 4, 1], [5], [9, 2]], []
    forward: Any = base
    for in_cpp in (True, False):
        cache = row_cache(base, rows=3, length=20)
        with torch.inference_mode():
            resident.model.routing.route = Route.of_rows(names, (3, 5))
            forward(**cache.whole_prompts(0, [[7, 8, 9], [6], [5, 4, 3, 2, 1]], base.device))
            given = cache.rests_of_prompts(0, drafts, [3, 1, 5], base.device)
            route = resident.model.routing.route = Route.of_rows(names, (3, 4))
            assert step.serves(route, packed)
            if in_cpp:
                found.append(step.of_prompts(cache, given, route, packed, every=True))
            else:
                logits = forward(**given).logits
                each = zip(logits, drafts, strict=True)
                found.append(torch.cat([own[-len(draft) :] for own, draft in each]))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5 * found[1].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_that_are_read_together_are_to_the_bit_those_one_after_the_other(
    dtype: torch.dtype,
):
    resident = resident_of(MODELS["tiles fit"], dtype)
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    if library().functions is None:
        pytest.skip(library().why_not)
    assert step is not None
    route, rests, starts = Route.of_rows(["wide", "odd"]), [[3, 1, 4], [1, 5, 9]], [4, 2]
    found = []
    for together in (True, False):
        cache = row_cache(base, rows=2, length=20)
        with torch.inference_mode():
            assert step.serves(route, packed)
            given = cache.whole_prompts(0, [[7, 8, 9, 2], [6, 3]], base.device)
            step.of_prompts(cache, given, route, packed)
            if together:
                given = cache.rests_of_prompts(0, rests, starts, base.device)
                logits = step.of_prompts(cache, given, route, packed, every=True)
                assert logits is not None
                found.append(logits.view(2, 3, -1))
                continue
            each = []
            for i, tokens in enumerate(zip(*rests, strict=True)):
                lengths = [start + i for start in starts]
                given = cache.newest_tokens(tokens, lengths, base.device)
                each.append(step(cache, given, route, packed))
            found.append(torch.stack(each, 1))
    assert torch.equal(*found)


def test_prompts_that_are_not_read_right_are_left_to_the_model():
    resident = resident_of(MODELS["tiles fit"], torch.float32)
    step, base = resident.carried.step, resident.base
    if library().functions is None:
        pytest.skip(library().why_not)
    assert step is not None
    cache = row_cache(base, rows=1, length=20)
    given = cache.whole_prompts(0, [[5, 6]], base.device)
    step.prove_prompts(lambda: step.of_prompts(cache, given) is None)
    assert step.longest_prompt == 0
    assert step.of_prompts(cache, given) is None


def test_a_long_prompt_is_left_to_the_model():
    resident = resident_of(MODELS["tiles fit"], torch.float32)
    step, base = resident.carried.step, resident.base
    if library().functions is None:
        pytest.skip(library().why_not)
    assert step is not None
    cache = row_cache(base, rows=1, length=60)
    given = cache.whole_prompts(0, [[5] * (step.longest_prompt + 1)], base.device)
    assert step.of_prompts(cache, given) is None


@pytest.mark.parametrize(
    ("weights", "names"), [(None, ["wide", "odd", BASE, "wide"]), ("int4", ["wide", "odd"])]
)
def test_a_row_depends_on_no_other_row(weights: str | None, names: list[str]):
    resident = resident_of(MODELS["blocks fit"], torch.bfloat16, weights)
    several, _ = both_ways(resident, names)
    alone, _ = both_ways(resident, names[:1])
    assert torch.equal(several[1:, 0], alone[1:, 0])  # the first step may have been PyTorch's


def test_what_is_nan_in_one_row_stays_in_it():
    resident = resident_of(MODELS["tiles fit"], torch.bfloat16)
    for tensor in resident.trained("odd").values():
        tensor.data.fill_(torch.nan)
    resident.model.packed.remove("odd")
    resident.pack(["odd"])
    found, _ = both_ways(resident, ["wide", "odd", BASE])
    assert found.isfinite().all(-1).tolist() == [[True, False, True]] * 3


def test_a_result_that_is_not_pytorchs_is_left_out():
    resident = resident_of(MODELS["tiles fit"], torch.float32)
    _, expected = both_ways(resident, [BASE])
    step = resident.carried.step
    assert step is not None
    step._judge(expected[0], expected[0])
    assert step.native is not None
    step._judge(expected[0].roll(1, -1), expected[0])
    assert step.native is None


@pytest.mark.parametrize(
    "settings", [{"CXX": "false"}, {"CXX": "no-such-compiler"}, {"LORAKIT_NATIVE": "0"}]
)
def test_without_a_compiler_there_is_a_reason_and_no_function(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = Library()
    assert found.functions is None
    assert found.why_not


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """g++ behind a script, given as a command with an argument; returns where runs are noted."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    notes = tmp_path / "notes"
    script = tmp_path / "cache g++"
    script.write_text(f'echo "$@" >> {notes}; shift; exec g++ "$@"')
    monkeypatch.setenv("CXX", f"sh '{script}' --launched")
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return notes


def compiled(notes: Path) -> int:
    """How often the source was compiled."""
    return sum(" -c " in line for line in notes.read_text().splitlines())


ASK = """import torch
from lorakit.engine.native.library import library
library().functions.decode_step"""
"""For processes of their own, as one never loads a library of the same path twice."""


def loads() -> None:
    subprocess.run([sys.executable, "-c", ASK], check=True)


def test_it_is_compiled_once_and_again_where_the_file_is_damaged(compiler: Path, tmp_path: Path):
    loads()
    loads()
    assert compiled(compiler) == 1
    [made] = (tmp_path / "home" / "native").iterdir()
    made.write_bytes(made.read_bytes()[:100])
    loads()
    assert compiled(compiler) == 2
    assert made.stat().st_size > 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_library_is_read_from_a_folder_that_cannot_be_written_to(compiler: Path, tmp_path: Path):
    loads()
    folder = tmp_path / "home" / "native"
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        loads()
    finally:
        folder.chmod(stat.S_IRWXU)
    assert compiled(compiler) == 1


def test_processes_that_compile_at_once_and_one_that_is_killed_leave_it_whole(compiler: Path):
    killed = subprocess.Popen([sys.executable, "-c", ASK], start_new_session=True)
    while not (compiler.exists() and compiled(compiler)):
        assert killed.poll() is None
    os.killpg(killed.pid, 9)
    killed.wait()
    others = [subprocess.Popen([sys.executable, "-c", ASK]) for _ in range(2)]
    assert [one.wait() for one in others] == [0, 0]
    loads()
