"""`lorakit merge` beside copying the same files, and beside PEFT's load, merge and save.

    python -m benchmarks.merge --dir /tmp/merge [--gb 8 --peft-gb 2 --rounds 3]

Writes a random Llama of that size, bfloat16 in several files, and an adapter (r=16, all linear
layers) into the folder; all of it is removed at the end. Sides take turns in processes of their
own. Importing is not timed. Copying flushes to the disk, as merging does; PEFT's saving does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.turns import Figures, peak_memory_mb, take_turns

SIDES = ("copy", "lorakit", "peft")
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, R = 4096, 14336, 32, 8, 32000, 16
SHARD_GB = 2.0


def _shapes() -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of a block's linear layers."""
    kv = HIDDEN * KV_HEADS // HEADS
    attention = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
    mlp = {
        "gate": (INTERMEDIATE, HIDDEN),
        "up": (INTERMEDIATE, HIDDEN),
        "down": (HIDDEN, INTERMEDIATE),
    }
    return {f"self_attn.{name}_proj": shape for name, shape in attention.items()} | {
        f"mlp.{name}_proj": shape for name, shape in mlp.items()
    }


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(layers):
        for name, shape in _shapes().items():
            yield f"model.layers.{i}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_base(folder: Path, gigabytes: float) -> float:
    """Writes a random model of about that size without holding it; returns its size in GB."""
    import torch
    from transformers import LlamaConfig

    from lorakit.models.shards import NewTensor, new_shard, write_index

    block = 2 * sum(a * b for a, b in _shapes().values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / block))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shards: list[dict[str, NewTensor]] = [{}]
    for name, shape in _tensors(layers):
        if sum(tensor.size for tensor in shards[-1].values()) > SHARD_GB * 1e9:
            shards.append({})
        shards[-1][name] = NewTensor("BF16", shape)
    torch.manual_seed(0)
    values = (torch.randn(1 << 24) * 0.02).bfloat16()  # the same ones again and again
    named = {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }
    for file, shard in named.items():
        with new_shard(folder / file, shard) as writer:
            for name, tensor in shard.items():
                rest = tensor.size // 2
                while rest:
                    writer.write(name, values[: min(rest, len(values))])
                    rest -= min(rest, len(values))
    write_index(folder, named)
    return sum(tensor.size for shard in shards for tensor in shard.values()) / 1e9


def write_lora(folder: Path, base: Path) -> None:
    """Writes an adapter on every linear layer of the model in `base`."""
    import torch

    from lorakit import LoraConfig
    from lorakit.lora.checkpoint import PREFIX, write_adapter

    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    tensors = {}
    for i in range(layers):
        for name, (d_out, d_in) in _shapes().items():
            path = f"{PREFIX}model.layers.{i}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(R, d_in) / d_in**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, R) * 0.01
    names = [name.rpartition(".")[2] for name in _shapes()]
    config = LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=names, base_model_name_or_path=str(base)
    )
    write_adapter(folder, config, tensors)


def measure(side: str, base: Path, adapter: Path, output: Path) -> Figures:
    """The seconds, and the peak of resident memory in MB, of one side."""
    if side == "copy":
        seconds = _copy(base, output)
    else:
        seconds = _lorakit(adapter, output) if side == "lorakit" else _peft(base, adapter, output)
    figures = {"seconds": seconds, "memory_mb": peak_memory_mb()}
    shutil.rmtree(output)
    return figures


def _copy(base: Path, output: Path) -> float:
    began = time.perf_counter()
    shutil.copytree(base, output)
    for path in output.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def _lorakit(adapter: Path, output: Path) -> float:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401 (not to be timed)
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lorakit
    from lorakit.adapters import in_memory, streaming, verify  # noqa: F401

    began = time.perf_counter()
    report = lorakit.merge(adapter, output, verify=False)
    assert report.streamed, report.notices
    return time.perf_counter() - began


def _peft(base: Path, adapter: Path, output: Path) -> float:
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401 (not to be timed)

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)
    return time.perf_counter() - began


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dir", required=True, type=Path, help="where there is room for twice --gb"
    )
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--peft-gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["write", *SIDES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    base, adapter, output = (options.dir / name for name in ("base", "adapter", "output"))
    if options.side == "write":
        size = write_base(base, options.gb)
        write_lora(adapter, base)
        print(json.dumps({"gb": size}))
        return
    if options.side:
        print(json.dumps(measure(options.side, base, adapter, output)))
        return
    table = Table(title=f"merging an adapter (r={R}, all linear layers) into a bfloat16 model")
    for heading in ("", "GB", "s", "GB/s", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    ratios: dict[str, float] = {}
    for gigabytes, sides in ((options.gb, SIDES[:2]), (options.peft_gb, SIDES[1:])):
        if not gigabytes:
            continue
        options.dir.mkdir(parents=True, exist_ok=True)
        try:
            # In a process of its own, since a child's peak is at least what its parent has.
            where = f"--dir={options.dir}"
            made = take_turns("benchmarks.merge", ["write"], [where, f"--gb={gigabytes}"], 1)
            size = made["write"]["gb"]
            found = take_turns("benchmarks.merge", sides, [where], options.rounds)
        finally:
            for folder in (base, adapter, output):
                shutil.rmtree(folder, ignore_errors=True)
        for side, figures in found.items():
            speed = f"{size / figures['seconds']:.2f}"
            cells = f"{figures['seconds']:.1f}", speed, f"{figures['memory_mb']:.0f}"
            table.add_row(side, f"{size:.1f}", *cells)
        ours, other = found["lorakit"], found["copy" if "copy" in sides else "peft"]
        speed_ratio = round(other["seconds"] / ours["seconds"], 3)
        if "copy" in sides:
            ratios |= {"gb": round(size, 2), "peak_mb": round(ours["memory_mb"])}
            ratios["speed_of_copying"] = speed_ratio
        else:
            memory = round(ours["memory_mb"] / other["memory_mb"], 3)
            ratios |= {"peft_gb": round(size, 2), "memory_by_peft": memory}
            ratios["speed_by_peft"] = speed_ratio
    Console().print(table)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
