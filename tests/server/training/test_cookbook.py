"""Recipes of tinker-cookbook 0.6.1, unchanged, learn with the bundled model; together as alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.models.names import resolve
from lorakit.server.options import ServerOptions
from served import Running, running

cookbook = pytest.importorskip("tinker_cookbook")
from cookbook import KNOWN, MODEL, Recipe, Workplace  # noqa: E402  (below the skip)

pytestmark = pytest.mark.exhaustive

CONVERSATIONS = Path(cookbook.__file__).parent / "example_data" / "conversations.jsonl"
SUPERVISED: dict[str, Any] = {
    "dataset": CONVERSATIONS,
    "batch_size": 4,
    "max_length": 256,
    "lora_rank": 8,
    "learning_rate": 1e-3,
    "lr_schedule": "constant",
}
STEPS = 6
LANGUAGES = {"ja": "こんにちは", "fr": "bonjour", "de": "guten Tag", "es": "buenos días"}

Values = Callable[[str], list[float]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ServerOptions(port=0, training_state=tmp_path_factory.mktemp("state"))
    with running(Path("smollm2-135m-instruct"), {}, options, max_rows=16) as server:
        yield server


@pytest.fixture(scope="module")
def work(service: Running, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    base = resolve("smollm2-135m-instruct").path
    made = Workplace(tmp_path_factory.mktemp("work"), base, service.url)
    texts = [
        {
            "chosen": f"\n\nHuman: Name number {i}.\n\nAssistant: Certainly, it is {i}.",
            "rejected": f"\n\nHuman: Name number {i}.\n\nAssistant: No, find out yourself.",
        }
        for i in range(48)
    ]
    made.write("Anthropic/hh-rlhf/train.jsonl", texts)
    made.write("Anthropic/hh-rlhf/test.jsonl", texts[:4])
    made.write(
        "rows.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"{text}, {i}"},
                    {"role": "assistant", "content": f"Final Answer: {code}"},
                ]
            }
            for i in range(8)
            for code, text in LANGUAGES.items()
        ],
    )
    questions = [{"question": f"What is {i} + {i}?"} for i in range(40)]
    made.write("zwhe99/DeepMath-103K/train.jsonl", questions)
    with CONVERSATIONS.open() as lines:
        made.write("HuggingFaceH4/no_robots/train.jsonl", [json.loads(line) for line in lines])
    # One answer in six is right, as the model copies what it is told.
    sides = "How many sides has a triangle? It is \\boxed{3}."
    made.write("openai/gsm8k/main/train.jsonl", [{"question": sides, "answer": "#### 3"}] * 8)
    config = {"config_name": "main", "data_files": [{"split": "train", "path": "main/train.jsonl"}]}
    card = f"---\n{json.dumps({'configs': [config]})}\n---\n"
    (made.folder / "openai" / "gsm8k" / "README.md").write_text(card)
    return made


@pytest.fixture(scope="module")
def known(work: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same model, served under a name from which the plain loops tell its renderer."""
    options = ServerOptions(port=0, training_state=tmp_path_factory.mktemp("known"))
    with running(work.folder / KNOWN, {}, options, max_rows=16) as server:
        yield server


def loop(work: Workplace, server: Running, recipe: str, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a recipe that is a plain loop."""
    plain = {"renderer_name": None, "behavior_if_log_dir_exists": None, "model_name": KNOWN}
    common = {"lora_rank": 8, "learning_rate": 1e-3, "save_every": 2}
    return work.start(recipe, recipe, url=server.url, **plain | common | settings).ended()


def supervised(work: Workplace, log: str, steps: int = STEPS, **more: Any) -> Recipe:
    return work.start("chat_sl.train", log, max_steps=steps, **SUPERVISED | more)


def preferences(work: Workplace, log: str, **more: Any) -> Recipe:
    settings = {"batch_size": 6, "max_length": 128, "learning_rate": 3e-4, **more}
    return work.start("preference.dpo.train", log, dataset="hhh", max_steps=3, **settings)


def distilled_prompt(work: Workplace, log: str, **more: Any) -> Recipe:
    settings = {"batch_size": 8, "max_length": 128, "learning_rate": 1e-3, "lora_rank": 8, **more}
    rows = work.folder / "rows.jsonl"
    return work.start("prompt_distillation.train", log, file_path=rows, max_steps=3, **settings)


def arithmetic(work: Workplace, log: str, **more: Any) -> Recipe:
    settings = {
        "group_size": 8,
        "groups_per_batch": 3,
        "max_tokens": 5,
        "learning_rate": 5e-4,
        "lora_rank": 8,
        "loss_fn": "importance_sampling",
        **more,
    }
    return work.start("math_rl.train", log, env="arithmetic", max_steps=6, **settings)


STARTED: dict[str, tuple[Callable[..., Recipe], str]] = {
    "supervised": (supervised, "train_mean_nll"),
    "preferences": (preferences, "dpo_loss"),
    "distilled_prompt": (distilled_prompt, "train_mean_nll"),
    "arithmetic": (arithmetic, "env/all/reward/total"),
}


def values(metrics: list[dict[str, Any]], name: str) -> list[float]:
    """A metric of each step that has it."""
    return [line[name] for line in metrics if name in line]


def rises(found: list[float], by: float) -> bool:
    """Whether the mean of the last third is above that of the first."""
    third = len(found) // 3
    return sum(found[-third:]) / third > sum(found[:third]) / third + by


@pytest.fixture(scope="module")
def alone(work: Workplace) -> Values:
    """What a recipe finds when nothing else runs."""
    known: dict[str, list[float]] = {}

    def found(name: str) -> list[float]:
        if name not in known:
            start, metric = STARTED[name]
            known[name] = values(start(work, f"alone-{name}").ended(), metric)
        return known[name]

    return found


def in_one_go(work: Workplace, order: list[int]) -> list[float]:
    """The losses of the recipe's batches, in this order, in a run that nothing stops."""
    import tinker
    from tinker_cookbook.supervised.common import compute_mean_nll
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(work.folder / MODEL),
        renderer_name="qwen3_instruct",
        max_length=SUPERVISED["max_length"],
        batch_size=SUPERVISED["batch_size"],
        train_on_what=None,
    )
    dataset, _ = FromConversationFileBuilder(common_config=common, file_path=str(CONVERSATIONS))()
    dataset.set_epoch(seed=0)
    adam = tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
    losses = []
    with tinker.ServiceClient(base_url=work.url, api_key="tml-local") as client:
        run = client.create_lora_training_client(MODEL, rank=SUPERVISED["lora_rank"]).result()
        for batch in order:
            data = dataset.get_batch(batch)
            found = run.forward_backward(data, "cross_entropy").result()
            run.optim_step(adam).result()
            logprobs = [out["logprobs"] for out in found.loss_fn_outputs]
            losses += [compute_mean_nll(logprobs, [d.loss_fn_inputs["weights"] for d in data])]
    return losses


def test_supervised_learning_lowers_the_loss_and_resumed_it_is_the_undisturbed_run(
    work: Workplace, alone: Values
):
    whole = alone("supervised")
    assert len(whole) == STEPS
    assert whole[-1] < 0.8 * whole[0]
    supervised(work, "killed", save_every=2).killed_after(3)
    resumed = supervised(work, "killed", save_every=2, behavior_if_log_dir_exists="resume").ended()
    found = {line["step"]: line["train_mean_nll"] for line in resumed}
    # The recipe submits a batch ahead of the one that it saves at, and makes both again.
    wanted = in_one_go(work, [0, 1, 2, 3, 2, 3, 4, 5])
    assert wanted[:4] == pytest.approx(whole[:4], abs=2e-3)
    assert [found[step] for step in range(2, STEPS)] == pytest.approx(wanted[4:], abs=2e-3)


def test_the_reward_of_arithmetic_rises(alone: Values):
    # A model of this size hardly adds; that an answer ends in time is what it learns at once.
    assert rises(alone("arithmetic"), by=0.02)


def test_dpo_prefers_what_is_chosen(work: Workplace, alone: Values):
    losses = alone("preferences")
    assert losses[0] == pytest.approx(0.693, abs=1e-2)
    assert losses[-1] < 0.5
    lines = (work.folder / "alone-preferences" / "metrics.jsonl").read_text().splitlines()
    accuracies = values([json.loads(line) for line in lines], "accuracy")
    assert accuracies[-1] == 1.0 > accuracies[0]


def test_a_prompt_is_distilled(alone: Values):
    losses = alone("distilled_prompt")
    assert losses[-1] < 0.5 * losses[0]


def test_a_student_comes_near_to_its_teacher_on_its_own_answers(work: Workplace, alone: Values):
    alone("supervised")
    lines = (work.folder / "alone-supervised" / "checkpoints.jsonl").read_text().splitlines()
    teacher = [json.loads(line)["sampler_path"] for line in lines if "sampler_path" in line][-1]
    metrics = work.start(
        "distillation.on_policy_distillation",
        "distilled",
        teacher_model=MODEL,
        teacher_checkpoint=teacher,
        dataset="deepmath",
        groups_per_batch=4,
        group_size=4,
        max_tokens=12,
        learning_rate=1e-3,
        lora_rank=8,
        max_steps=6,
    ).ended()
    divergences = values(metrics, "teacher_kl")
    assert rises([-one for one in divergences], by=0.1 * divergences[0])


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("multiplayer_rl.guess_number.train", {"group_size": 2, "batch_size": 1, "eval_every": 0}),
        ("preference.shorter.train", {"group_size": 2, "batch_size": 2, "eval_every": 0}),
        ("multiplayer_rl.text_arena.train", {"batch_size": 2, "eval_every": 0}),
    ],
)
def test_recipes_of_several_turns_and_of_pairs_run_to_their_end(
    work: Workplace, recipe: str, settings: dict[str, Any]
):
    if "text_arena" in recipe:
        pytest.importorskip("textarena", exc_type=ImportError)
    metrics = work.start(recipe, recipe, max_steps=1, max_tokens=8, **settings).ended()
    assert len(values(metrics, "progress/batch")) == 1


def test_the_plain_loop_of_supervised_learning_lowers_the_loss(work: Workplace, known: Running):
    found = loop(work, known, "sl_loop", batch_size=4, max_length=128, max_steps=6)
    losses = values(found, "train_mean_nll")
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_plain_loop_of_reinforcement_learning_makes_steps(work: Workplace, known: Running):
    settings = {"batch_size": 2, "group_size": 16, "max_tokens": 40, "max_steps": 2}
    found = loop(work, known, "rl_loop", loss_fn="importance_sampling", **settings)
    assert len(values(found, "reward/total")) == 2
    assert values(found, "grad_norm:mean"), "no step was made: no group has different rewards"


def test_four_recipes_at_once_have_what_each_has_alone(
    work: Workplace, alone: Values, service: Running
):
    wanted = {name: alone(name) for name in STARTED}
    before = service.engine.training.shared
    started = {
        name: start(work, f"together-{name}", key=f"tml-{name}")
        for name, (start, _) in STARTED.items()
    }
    found = {name: values(run.ended(900), STARTED[name][1]) for name, run in started.items()}
    assert service.engine.training.shared > before
    for name in ("supervised", "preferences", "distilled_prompt"):
        assert found[name] == pytest.approx(wanted[name], abs=2e-3), name
    assert rises(found["arithmetic"], by=0.02)  # its samples are drawn anew
