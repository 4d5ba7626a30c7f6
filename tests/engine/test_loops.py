"""A loop of one's own over `lorakit.Engine`: the examples learn, and saved adapters go on."""

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.adapters.merge import merge
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.resident import ResidentModel
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError, LorakitError

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT, ANSWER = [5, 6, 7, 8], [40, 41, 42]


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_trains_samples_saves_and_goes_on_from_its_files(tiny_model: Path, tmp_path: Path):
    with lorakit.Engine(tiny_model, dtype="float32") as engine:
        parts = ["q_proj", "down_proj", "lm_head"]
        engine.create_adapter("mine", r=8, lora_alpha=32, target_modules=parts, seed=3)
        rows = [engine.row("mine", PROMPT, ANSWER)]
        first = engine.forward_backward(rows).metrics
        assert first["tokens"] == 3
        engine.optim_step("mine", learning_rate=5e-2)
        for _ in range(30):
            engine.forward_backward(rows)
            assert engine.optim_step("mine", 5e-2, max_grad_norm=1.0)["grad_norm"] > 0
        assert engine.forward(rows).metrics["loss"] < 0.2 < first["loss"]
        [answer] = engine.sample([PROMPT], "mine", max_new_tokens=3)
        assert answer.tokens == ANSWER
        [base] = engine.sample([PROMPT], max_new_tokens=3)
        assert base.tokens != ANSWER
        engine.save("mine", tmp_path / "mine")
        engine.load("again", tmp_path / "mine")
        both = [*rows, engine.row("again", PROMPT, ANSWER)]
        for _ in range(2):
            losses = engine.forward_backward(both).losses
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)
            for name in ("mine", "again"):
                engine.optim_step(name, 3e-2)
    with pytest.raises(LorakitError, match="closed"):
        engine.forward(rows)


def test_an_adapter_of_a_tied_head_is_for_peft_and_merge_what_it_is_here(
    tiny_model: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tied = model.config
    tied.tie_word_embeddings = True
    folder = tmp_path / "tied"
    type(model)(tied).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    with lorakit.Engine(folder, dtype="float32") as engine:
        engine.create_adapter("mine", r=8, lora_alpha=32, target_modules=["q_proj", "lm_head"])
        rows = [engine.row("mine", PROMPT, ANSWER)]
        for _ in range(5):
            engine.forward_backward(rows)
            engine.optim_step("mine", learning_rate=3e-2)
        [wanted] = engine.forward(rows).logprobs
        engine.save("mine", tmp_path / "mine")
    merge(tmp_path / "mine", tmp_path / "merged", base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.equal(base.get_input_embeddings().weight)
    for other in (peft.PeftModel.from_pretrained(base, tmp_path / "mine"), merged):
        with torch.no_grad():
            logs = other(torch.tensor([[*PROMPT, *ANSWER]])).logits[0].log_softmax(-1)
        found = [logs[len(PROMPT) - 1 + i, token] for i, token in enumerate(ANSWER)]
        torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-4, atol=1e-4)


def test_threads_that_train_adapters_of_one_engine_share_passes(tiny_model: Path):
    with lorakit.Engine(tiny_model, dtype="float32") as engine:
        for name, rank in (("a", 1), ("b", 8)):
            engine.create_adapter(name, r=rank, seed=1)

        def train(name: str) -> None:
            rows = [engine.row(name, PROMPT, ANSWER)]
            for _ in range(5):
                engine.forward_backward(rows)
                engine.optim_step(name, 1e-2)

        threads = [threading.Thread(target=train, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = {name: engine.resident.trained(name) for name in "ab"}
    model = lorakit.load_model(str(tiny_model), "float32")[0]
    alone = ResidentModel(model)
    alone.create("b", lorakit.LoraConfig(r=8, target_modules="all-linear"), seed=1)
    for _ in range(5):
        alone.forward_backward([engine.row("b", PROMPT, ANSWER)])
        alone.optim_step("b", AdamW(1e-2))
    for key, tensor in alone.trained("b").items():
        torch.testing.assert_close(found["b"][key], tensor, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_a_line(tiny_model: Path, tmp_path: Path):
    with lorakit.Engine(tiny_model) as engine:
        engine.create_adapter("mine", r=1)
        row = engine.row("mine", PROMPT, ANSWER)
        for message, call in (
            ("there is an adapter mine", lambda: engine.create_adapter("mine")),
            ("not both", lambda: engine.create_adapter("x", lorakit.LoraConfig(), r=3)),
            ("there is no adapter x", lambda: engine.forward([engine.row("x", PROMPT, ANSWER)])),
            ("there is no loss 'nonsense'", lambda: engine.forward([row], "nonsense")),
            ("needs loss_fn_inputs logprobs", lambda: engine.forward([row], "ppo")),
            ("no gradients", lambda: engine.optim_step("mine")),
            ("there is no adapter y", lambda: engine.sample([PROMPT], "y")),
            ("no adapter", lambda: engine.load("z", tmp_path)),
            ("advantages: 5 values", lambda: engine.row("mine", PROMPT, ANSWER, advantages=[1])),
        ):
            with pytest.raises(InputError, match=message):
                call()


@pytest.mark.exhaustive
def test_the_examples_learn(tmp_path: Path):
    loop = example("sft_loop")
    assert loop.main(folder=str(tmp_path / "parrot")) == loop.ANSWER
    means = example("reinforce_loop").main()
    assert sum(means[-3:]) > 1.3 * sum(means[:3])


def test_answers_are_given_as_much_time_as_passes(tiny_model: Path):
    passes: list[float] = []

    def slow(logprobs: torch.Tensor, _: Any) -> torch.Tensor:
        time.sleep(0.3)
        passes.append(0.3)
        return -logprobs.sum()

    with lorakit.Engine(tiny_model, dtype="float32") as engine:
        engine.create_adapter("mine", r=2)
        row = engine.row("mine", PROMPT, ANSWER)
        futures = [engine.training.forward_backward("mine", [row], slow) for _ in range(12)]
        settings = Sampling(max_new_tokens=40, end_tokens=frozenset(), logprobs=0)
        pieces = [*engine.submit(PROMPT, None, settings)]
        assert pieces[-1].new_tokens == 40
        assert 0 < len(passes) < 12  # neither waits for all of the other
        for future in futures:
            future.result()
