"""A combined adapter changes the weights by what its method says, in PEFT as here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from families import make_llama
from lorakit.adapters.combine import METHODS, combine
from lorakit.adapters.derived import sha256
from lorakit.adapters.manifest import read_record
from lorakit.adapters.open import open_adapter
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_config
from random_adapters import change, logits, make_adapter
from tiny import byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters with nothing in common but the base."""
    folder = tmp_path_factory.mktemp("two")
    one = make_adapter(tiny_model, folder / "one", rank_pattern={"q_proj": 2}, lora_alpha=6)
    other = make_adapter(
        tiny_model,
        folder / "other",
        seed=1,
        r=3,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
    )
    return one, other


def weighted(base: Path, adapters: tuple[Path, ...], weights: list[float]) -> Any:
    changes = [change(base, adapter) for adapter in adapters]
    return {
        name: sum(w * delta[name] for w, delta in zip(weights, changes, strict=True))
        for name in changes[0]
    }


def test_biases_of_b_of_one_adapter_become_zeros_elsewhere_and_go_with_no_embedding(tmp_path: Path):
    torch.manual_seed(0)
    make_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    biased = {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}
    one = make_adapter(tmp_path / "base", tmp_path / "one", **biased)
    other = make_adapter(tmp_path / "base", tmp_path / "two", target_modules=["q_proj", "up_proj"])
    combine((one, other), tmp_path / "sum", weights=[0.5, 2])
    tensors = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert len([key for key in tensors if key.endswith("lora_B.bias")]) == len(tensors) // 3 == 6
    expected = weighted(tmp_path / "base", (one, other), [0.5, 2])
    found = change(tmp_path / "base", tmp_path / "sum")
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    tokens = make_adapter(tmp_path / "base", tmp_path / "t", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="embeddings cannot have"):
        combine((one, tokens), tmp_path / "out", weights=[1, 1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_exact_methods_are_the_weighted_sum_in_peft_too(
    method: str, two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    report = combine(two, tmp_path / "sum", weights=[0.7, -1.3], method=method)
    assert report.lost == 0
    assert report.notices == ["11 of 15 modules are not in all adapters"]
    expected = weighted(tiny_model, two, [0.7, -1.3])
    found = change(tiny_model, tmp_path / "sum")
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    ids = torch.arange(40)[None] * 5 % 259
    with torch.no_grad():
        ours = open_adapter(tmp_path / "sum", dtype="float32").model(ids).logits
    theirs = logits(tiny_model, tmp_path / "sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    config = read_config(tmp_path / "sum")
    assert config.rank_for("model.layers.1.self_attn.q_proj") == 5
    assert config.rank_for("model.layers.1.self_attn.v_proj") == 4


def test_a_truncated_sum_is_the_best_of_its_rank_and_says_what_it_lost(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    expected = weighted(tiny_model, two, [1, 1])
    report = combine(two, tmp_path / "a", weights=[1, 1], method="svd", rank=3)
    combine(two, tmp_path / "b", weights=[1, 1], method="linear", rank=3)
    found, same = change(tiny_model, tmp_path / "a"), change(tiny_model, tmp_path / "b")
    lost = energy = 0.0
    for name, delta in expected.items():
        if delta.dim() < 2:
            continue
        torch.testing.assert_close(found[name], same[name])
        S = torch.linalg.svdvals(delta.double())
        error = (found[name] - delta).double().square().sum()
        torch.testing.assert_close(error, S[3:].square().sum(), rtol=1e-3, atol=1e-6)
        lost, energy = lost + error.item(), energy + S.square().sum().item()
    assert report.lost == pytest.approx(lost / energy, rel=1e-3)
    assert report.lost > 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("linear", "cat", "svd")])
def test_methods_on_entries_write_adapters_that_peft_loads(
    method: str, two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    seed = 3 if method.startswith("dare") else None
    report = (
        combine(two, tmp_path / "a", weights=[1, 1], method=method, rank=32, density=0.5, seed=seed)
        if method != "knots"
        else combine(two, tmp_path / "a", weights=[1, 1], method=method, density=0.5)
    )
    assert report.lost < 1e-6
    found = change(tiny_model, tmp_path / "a")
    parts = [change(tiny_model, adapter) for adapter in two]
    name = "model.layers.0.mlp.down_proj.weight"
    a, b = parts[0][name], parts[1][name]
    if method == "ties":
        kept = [
            d * (d.abs() >= d.abs().flatten().topk(d.numel() // 2).values.min()) for d in (a, b)
        ]
        sign = (kept[0] + kept[1]).sign()
        agree = [(k.sign() == sign) & (k != 0) for k in kept]
        total = sum(k * g for k, g in zip(kept, agree, strict=True))
        expected = total / sum(g.float() for g in agree).clamp(min=1)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert found[name].norm() > 0.1 * (a + b).norm()
    if seed is not None:
        combine(two, tmp_path / "b", weights=[1, 1], method=method, rank=32, density=0.5, seed=seed)
        files = [tmp_path / x / "adapter_model.safetensors" for x in "ab"]
        assert sha256(files[0]) == sha256(files[1])
        combine(two, tmp_path / "c", weights=[1, 1], method=method, rank=32, density=0.5, seed=4)
        assert not torch.equal(change(tiny_model, tmp_path / "c")[name], found[name])


def test_knots_merges_the_parts_of_a_decomposition_of_all_updates_side_by_side(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    combine(two, tmp_path / "a", weights=[1, 0.5], method="knots", density=1.0)
    found = change(tiny_model, tmp_path / "a")
    parts = [change(tiny_model, adapter) for adapter in two]
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = parts[0][name].double(), parts[1][name].double()
    U, S, Vh = torch.linalg.svd(torch.cat([a, b], dim=1), full_matrices=False)
    U, S, Vh = U[:, :7], S[:7], Vh[:7]
    V = torch.stack([Vh[:, : a.shape[1]], 0.5 * Vh[:, a.shape[1] :]])
    agree = V.sign() == V.sum(0).sign()
    merged = (V * agree).sum(0) / agree.sum(0)
    torch.testing.assert_close(found[name].double(), U * S @ merged, rtol=1e-3, atol=1e-5)


def test_what_started_from_the_weight_is_combined_by_what_it_changed(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path
):
    pissa = make_adapter(tiny_model, tmp_path / "pissa", seed=2, init_lora_weights="pissa")
    combine([pissa, two[0]], tmp_path / "sum", weights=[1, 1])
    opened = open_adapter(pissa, dtype="float32").model.merge_and_unload().state_dict()
    base = lorakit.load_model(tiny_model, "float32")[0].state_dict()
    other, found = change(tiny_model, two[0]), change(tiny_model, tmp_path / "sum")
    for name, delta in found.items():
        expected = opened[name] - base[name] + other[name]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_whole_modules_of_one_adapter_and_the_chat_template_come_along(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path
):
    head = make_adapter(tiny_model, tmp_path / "head", modules_to_save=["lm_head"])
    for folder in (two[0], head):
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    report = combine([two[0], head], tmp_path / "sum", weights=[1, 0.5])
    assert any("carried along as they are" in notice for notice in report.notices)
    (two[0] / "chat_template.jinja").unlink()
    name = "lm_head.weight"
    expected = change(tiny_model, head)[name]
    torch.testing.assert_close(change(tiny_model, tmp_path / "sum")[name], expected)
    opened = open_adapter(tmp_path / "sum")
    assert opened.tokenizer.chat_template == "{{ messages }}"
    assert opened.base_model == str(tiny_model)
    record = read_record(tmp_path / "sum")
    assert record is not None
    assert record.made_by == "combine"
    assert record.options["weights"] == [1, 0.5]
    assert record.sources[1].sha256 == sha256(head / "adapter_model.safetensors")
    again = make_adapter(tiny_model, tmp_path / "again", seed=8, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"each have their own .*lm_head\.weight"):
        combine([head, again], tmp_path / "no", weights=[1, 1])


def test_what_cannot_be_combined_is_refused_and_nothing_is_written(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path
):
    def refusal(*adapters: Path, **options: Any) -> str:
        given = {"weights": [1.0] * len(adapters), **options}
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError) as error:
            combine(adapters, tmp_path / "out", **given)
        assert sorted(tmp_path.iterdir()) == before
        return str(error.value)

    one, other = two
    assert "2 adapters and 1 weights" in refusal(one, other, weights=[1])
    assert "the weight of" in refusal(one, other, weights=[1, 0])
    assert "give a number" in refusal(one, other, weights=[1, float("nan")])
    assert "given twice" in refusal(one, one / ".." / "one")
    assert "did you mean 'ties'" in refusal(one, method="tie")
    assert "at least 1, not 0" in refusal(one, other, method="svd", rank=0)
    assert "more than any module can have: the largest is 7" in refusal(
        one, other, method="svd", rank=8
    )
    assert "needs a density in (0, 1]" in refusal(one, method="ties")
    assert "needs a density in (0, 1]" in refusal(one, method="knots", density=1.5)
    assert "--density has no effect" in refusal(one, density=0.5)
    assert "--seed has no effect" in refusal(one, seed=1)
    assert "there is no adapter_config.json" in refusal(one, tiny_model)
    dora = make_adapter(tiny_model, tmp_path / "dora", use_dora=True)
    assert "is a DoRA adapter" in refusal(one, dora)
    biased = make_adapter(tiny_model, tmp_path / "biased", bias="all")
    assert "trains biases" in refusal(one, biased)
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    strange = make_adapter(wide, tmp_path / "strange")
    assert "is 32 × 48 in one and 64 × 48 in the other" in refusal(one, strange)
    loftq = make_adapter(tiny_model, tmp_path / "loftq", init_lora_weights="loftq")
    assert "as LoftQ quantised it" in refusal(one, loftq)
    same = make_adapter(tiny_model, tmp_path / "same", seed=5)
    config = json.loads((same / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere"
    (same / "adapter_config.json").write_text(json.dumps(config))
    assert "say which one with --base" in refusal(one, same)
    combine([one, same], tmp_path / "said", weights=[1, 1], base=str(tiny_model))
    assert read_config(tmp_path / "said").base_model_name_or_path == str(tiny_model)
    weights = load_file(same / "adapter_model.safetensors")
    weights[next(iter(weights))][0, 0] = torch.inf
    save_file(weights, same / "adapter_model.safetensors")
    assert "holds NaN or Inf" in refusal(same)
    with pytest.raises(InputError, match="already exists"):
        combine([one], one, weights=[2])


def test_adapters_that_were_trained_on_other_weights_are_refused(
    two: tuple[Path, Path], tiny_model: Path, tmp_path: Path
):
    for i, name in enumerate(("a", "b")):
        combine([two[i]], tmp_path / name, weights=[1])
        path = tmp_path / name / "lorakit.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_fingerprint": f"print {i}"})
        )
    with pytest.raises(InputError, match="different weights"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[1, 1])
