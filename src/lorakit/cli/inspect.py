"""`lorakit inspect`: what an adapter is, and whether it fits a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.console import say, say_all, say_json
from lorakit.errors import BASE_OPTION

if TYPE_CHECKING:
    from lorakit.adapters.inspect import Fit, Inspection


def inspect(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    base: Annotated[
        str | None, typer.Option(help="A base model to check the adapter against.")
    ] = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="Show every module, not only kinds of module.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what an adapter is, from its files alone.

    The exit code is 1 when it does not fit --base.
    """
    from lorakit.adapters.inspect import inspect as run

    found = run(adapter, base=base)
    if as_json:
        say_json(found.to_dict())
    else:
        _show(found, modules)
    if found.fit and not found.fit.fits:
        raise typer.Exit(1)


def _show(found: Inspection, every_module: bool) -> None:
    for name, value in _facts(found).items():
        say(f"{name + ':':<12} {value}")
    if found.run:
        facts = ", ".join(f"{key} {_short(value)}" for key, value in found.run.items())
        say(f"{'record:':<12} {facts}")
    for parent in found.parents:
        how = {"continue": "continues", "freeze": "on top of"}[parent.mode]
        say(f"{how + ':':<12} {parent.path} (sha256 {parent.sha256[:12]}, {parent.state})")
    if (teacher := found.teacher) is not None:
        say(f"{'teacher:':<12} {teacher.path} (sha256 {teacher.sha256[:12]}, {teacher.state})")
    if found.stands_on:
        say(f"{'frozen:':<12} added to {', '.join(found.stands_on)} (not counted below)")
    _show_modules(found, every_module)
    for whole in found.whole[:20]:
        size = " × ".join(map(str, whole.shape))
        say(f"whole: {whole.key} ({size}, {whole.parameters:,} parameters)")
    if len(found.whole) > 20:
        say(f"whole: and {len(found.whole) - 20} more tensors (--json has them all)")
    for part in found.skipped:
        say(f"no spectrum: {part.path}: {part.reason}")
    if found.fit:
        say(_fit(found.fit))
    say_all(found.notices)


def _facts(found: Inspection) -> dict[str, str]:
    from lorakit.cli.tables import spread

    targets = found.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(targets or [])
    scaling = spread(module.scaling for module in found.modules)
    extras = [
        name for name, is_set in (("rsLoRA", found.use_rslora), ("DoRA", found.use_dora)) if is_set
    ]
    ranks = spread([module.r for module in found.modules] or [found.r])
    alpha = spread([found.lora_alpha, *found.alpha_pattern.values()])
    facts = {
        "base": found.base_model or "not said",
        "task": found.task_type or "not said",
        "made by": found.made_by,
        "method": ", ".join(["LoRA", *extras, f"init_lora_weights={found.init_lora_weights}"]),
        "rank": f"{ranks}, alpha {alpha}, so B A is multiplied by {scaling}",
        "targets": shown if len(shown) <= 200 else f"{shown[:200]} …",
        "size": f"{found.parameters:,} parameters in {found.bytes:,} bytes, "
        + ", ".join(f"{number} tensors {name}" for name, number in found.dtypes.items()),
    }
    if found.chat_template:
        facts["template"] = f"its own (sha256 {found.chat_template[:12]})"
    if found.modules_to_save:
        facts["whole"] = ", ".join(found.modules_to_save)
    return facts


def _show_modules(found: Inspection, every_module: bool) -> None:
    from statistics import fmean

    from lorakit.adapters.inspect import SHARE
    from lorakit.cli.tables import print_table, spread

    headings = ("module", "number", "shape", "r", "‖ΔW‖", "effective rank", f"{SHARE:.0%} in")
    groups: dict[str, list[Any]] = {}
    for module in found.modules:
        key = module.path if every_module else module.path.rpartition(".")[2]
        groups.setdefault(key, []).append(module)
    rows = [
        (
            kind,
            str(len(group)),
            " ".join(dict.fromkeys(f"{m.shape[0]}×{m.shape[1]}" for m in group)),
            spread(m.r for m in group),
            spread((m.norm for m in group), "{:.3g}"),
            f"{fmean(m.effective_rank for m in group):.1f}",
            spread(m.directions for m in group),
        )
        for kind, group in groups.items()
    ]
    if rows:
        print_table("", headings, rows)


def _fit(fit: Fit) -> str:
    if not fit.fits:
        return f"does not fit {fit.base}: {fit.reason.replace(BASE_OPTION, '--base')}"
    weights = {
        True: "its weights are those that it was trained on (fingerprint)",
        False: "but its weights are not those that it was trained on (fingerprint): "
        "answers may be worse",
        None: "whether its weights are those that it was trained on is not known (no fingerprint)",
    }[fit.same_weights]
    more = f" with {fit.added_tokens} more tokens" if fit.added_tokens else ""
    return f"fits {fit.base}{more} (names and shapes); {weights}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
