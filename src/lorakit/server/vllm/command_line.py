"""From adapters to vLLM's command line: what is served, from which files, with which limits.

The adapters' files are read and checked, and the base's modules are looked at without weights.
Only an adapter that vLLM would read otherwise than it is meant is written anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapters.chat_template import AdapterTemplate, adapter_template
from lorakit.adapters.derived import Origin, origin, other_weights, sha256
from lorakit.adapters.export.vllm import (
    EMBEDDINGS,
    Servable,
    lora_module,
    read_servable,
    template_file,
    write_copy,
)
from lorakit.adapters.export.vllm_base import (
    Base,
    find_base,
    fingerprint,
    fitted_to,
    require_context,
    require_lora,
    slot_bytes,
)
from lorakit.adapters.open import trained_quantization
from lorakit.console import say
from lorakit.errors import InputError, LorakitError, listed, one_line
from lorakit.lora.checkpoint import weights_file
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME
from lorakit.models.bundled import home, usable_folder
from lorakit.models.layouts import layout_of
from lorakit.models.skeleton import skeleton
from lorakit.models.template_files import default_of
from lorakit.server.options import check_key, is_loopback, require_key

MOST_SLOTS = 16
"""Adapters in one batch at most: each slot takes memory of the GPU, used or not."""
LATER = 8
"""Slots in all, at least, where adapters can be loaded later."""


DTYPES = ("auto", "bfloat16", "float16")


@dataclass(frozen=True)
class VllmOptions:
    """What is served, and where: the options of `lorakit serve` that vLLM has too.

    `adapters` are folders by the names that clients give as `model`. `model` is the base, by
    default the one that the adapters record. `adapter_root` and `admin_key` together allow
    loading adapters later. `workspace` is where copies of adapters are written, by default in
    lorakit's cache. `context_length` counts tokens, prompt and answer together.
    """

    model: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_key: str | None = None
    adapter_root: Path | None = None
    context_length: int | None = None
    dtype: str | None = None
    enable_prefix_caching: bool = True
    workspace: Path | None = None


def _require_sound(options: VllmOptions) -> None:
    """Raises InputError for options that cannot be meant."""
    if options.model is None and not options.adapters:
        raise InputError("there is nothing to serve: give adapters, or --model")
    if "" in options.adapters:
        raise InputError("an adapter needs a name: NAME=PATH")
    if not options.host or options.host.startswith("-"):
        raise InputError(f"--host {options.host!r} is not an address")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError(
            f"vLLM computes adapters in {listed(DTYPES[1:])}, not in {options.dtype}: leave "
            "--dtype out, or serve with --engine lorakit"
        )
    check_key("--api-key", options.api_key)
    check_key("--admin-key", options.admin_key)
    require_key(options.host, options.api_key is not None)
    if (options.adapter_root is None) != (options.admin_key is None):
        raise InputError("loading adapters later needs both --adapter-root and --admin-key")
    if options.adapter_root is not None and options.api_key is None:
        raise InputError(
            "vLLM has one key, which guards loading adapters too: give --api-key beside "
            "--adapter-root"
        )


@dataclass(frozen=True)
class VllmCommand:
    """The command that serves, the variables that it needs, and what the user should know."""

    command: tuple[str, ...]
    environment: dict[str, str]
    notices: tuple[str, ...]

    def shown(self) -> str:
        """The command for a shell, with its variables.

        The key is not in it: the line takes it from `VLLM_API_KEY`, and stops without one.
        """
        variables = [
            f'{name}="${{{name}:?}}"' if name == "VLLM_API_KEY" else f"{name}={shlex.quote(value)}"
            for name, value in self.environment.items()
        ]
        return " ".join([*variables, shlex.join(self.command)])


def serve(options: VllmOptions, *, dry_run: bool = False) -> None:
    """Serves with vLLM: the entry point for `lorakit serve --engine vllm`.

    The notices and the command are printed, as a comment a notice and one line for a shell: with
    `dry_run` on stdout, and that is all; otherwise on stderr, and this process becomes vLLM's, so
    the call does not return. Model ids and routes are those of lorakit's own server: the adapters'
    names and the base's, `/v1/chat/completions`, `/v1/completions`, `/v1/models`,
    `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, `/health`, `/metrics`.

    Copies of adapters that vLLM would misread are written with `dry_run` too, as the command names
    them.

    Raises:
        InputError: vLLM is not installed here, cannot serve this, or an option is wrong.
        LorakitError: the system refuses to start it.
    """
    if not dry_run and shutil.which("vllm") is None:
        raise InputError(
            "there is no program vllm on the PATH: pip install vllm (on a machine with a GPU), or "
            "add --dry-run to see the command that would be started"
        )
    planned = plan(options)
    for line in [*(f"# {notice}" for notice in planned.notices), planned.shown()]:
        say(line, err=not dry_run)
    if not dry_run:
        try:
            os.execvpe(planned.command[0], planned.command, os.environ | planned.environment)
        except OSError as error:
            raise LorakitError(f"vllm cannot be started: {error.strerror or error}") from error


def plan(options: VllmOptions) -> VllmCommand:
    """Checks what `options` ask for, and writes the copies of adapters that vLLM needs.

    Raises:
        InputError: vLLM cannot serve it, or the options contradict each other.
    """
    _require_sound(options)
    notices: list[str] = []
    servables = {
        name: read_servable(folder, options.model) for name, folder in options.adapters.items()
    }
    origins = {name: origin(s.folder, s.plain.config) for name, s in servables.items()}
    base, revision = _common_base(options, servables, origins)
    if base.name in servables:
        raise InputError(f"the base model and an adapter are both called {base.name}: rename one")
    lora = bool(servables) or options.adapter_root is not None
    if lora:
        require_lora(base)
    model = None if base.folder is None else skeleton(base.folder)
    if model is None:
        notices.append(f"{base.name} is not on this machine: nothing of it was checked")
    else:
        servables = {name: fitted_to(found, model, base) for name, found in servables.items()}
        if options.context_length is not None:
            require_context(options.context_length, model, base)
    notices += _other_weights(origins, base, model)
    for name, folder in options.adapters.items():
        if stored := trained_quantization(folder):
            notices.append(
                f"{name} was trained beside a base quantised to {stored}: vLLM serves it beside "
                "the one that is not"
            )
    workspace = (options.workspace or home() / "vllm").absolute()
    template = _template(servables, base, workspace, notices)

    command = ["vllm", "serve", base.argument, f"--served-model-name={base.name}"]
    if base.is_hub_id and revision is not None:
        command += ["--revision", revision]
    if lora:
        command += _limits(servables, model, options, notices)
    # Without this vLLM takes defaults of sampling from the model's generation_config.json.
    command += ["--generation-config", "vllm"]
    if template is not None:
        command += ["--chat-template", str(template)]
    if options.dtype is not None:
        command += ["--dtype", options.dtype]
    if options.context_length is not None:
        command += ["--max-model-len", str(options.context_length)]
    if not options.enable_prefix_caching:
        command += ["--no-enable-prefix-caching"]
    command += ["--host", options.host, "--port", str(options.port)]
    if servables:  # last, as it takes everything up to the next option
        command += ["--lora-modules", *_modules(servables, base, options, notices)]
    environment = _environment(options, notices)
    return VllmCommand(tuple(command), environment, tuple(one_line(notice) for notice in notices))


def _common_base(
    options: VllmOptions, servables: Mapping[str, Servable], origins: Mapping[str, Origin]
) -> tuple[Base, str | None]:
    """The one base model of all, and its revision on the hub if one is recorded.

    Raises:
        InputError: the adapters are for different ones.
    """
    revisions = list(dict.fromkeys(s.plain.config.revision for s in servables.values()))
    if options.model is not None:
        recorded = {found.base_model for found in origins.values()}
        revision = revisions[0] if recorded == {options.model} and len(revisions) == 1 else None
        return find_base(options.model, revision), revision
    first, *others = origins
    base = find_base(servables[first].plain.base_model, revisions[0])
    for other in others:
        name, prints = servables[other].plain.base_model, _prints(origins, first, other)
        if not _same(name, base) and not (None not in prints and len(prints) == 1):
            raise InputError(
                f"{first} is for {base.name} and {other} for {name}, and a server has one base: "
                "start one for each, or give --model if they are the same"
            )
    if base.is_hub_id and len(revisions) > 1:
        raise InputError(
            f"the adapters are for the revisions {listed(map(str, revisions))} of {base.name}, "
            "and a server has one base: start one for each, or give --model"
        )
    return base, revisions[0]


def _prints(origins: Mapping[str, Origin], *names: str) -> set[str | None]:
    return {origins[name].base_fingerprint for name in names}


def _other_weights(origins: Mapping[str, Origin], base: Base, model: Any | None) -> list[str]:
    """A notice for every adapter that was trained on other weights, as far as that is known."""
    known = any(o.base_fingerprint for o in origins.values())
    own = fingerprint(base, model) if model is not None and known else None
    notices = []
    for name, found in origins.items():
        if own is not None and found.base_fingerprint is not None:
            if found.base_fingerprint != own:
                notices.append(other_weights(name, base.name))
        elif found.base_model is not None and not _same(found.base_model, base):
            notices.append(
                f"{name} was trained on {found.base_model}: its answers are right only if "
                f"{base.name} has the same weights"
            )
    return notices


def _same(name: str, base: Base) -> bool:
    """Whether `name` means the model `base`."""
    if name == base.name:
        return True
    try:
        other = find_base(name)
    except InputError:
        return False
    return os.path.realpath(other.argument) == os.path.realpath(base.argument)


def _template(
    servables: Mapping[str, Servable], base: Base, workspace: Path, notices: list[str]
) -> Path | None:
    """The file with the chat template that all adapters were trained with, if not the base's.

    Raises:
        InputError: they were trained with different ones.
    """
    own = None if base.folder is None else layout_of(base.folder).templates()
    found: dict[str | None, AdapterTemplate] = {}
    names: dict[str | None, str] = {}
    for name, servable in servables.items():
        trained = adapter_template(servable.folder)
        if base.folder is not None and (notice := trained.notice(base.name, own)):
            notices.append(notice)
        text = default_of(own if trained.own is None else trained.own)
        text = text and text.strip()
        names.setdefault(text, name)
        if trained.own is not None:
            found.setdefault(text, trained)
    if len(names) > 1:
        one, other, *_ = names.values()
        raise InputError(
            f"{one} and {other} have different chat templates, and vLLM has one for all: start a "
            "server for each, or serve with --engine lorakit"
        )
    text, plain = next(iter(names), None), default_of(own)
    if text is None or text == (plain and plain.strip()):
        return None
    notices.append(f"the chat template is that of {names[text]}, also for {base.name} alone")
    return template_file(found[text], workspace)


def _limits(
    servables: Mapping[str, Servable], model: Any | None, options: VllmOptions, notices: list[str]
) -> list[str]:
    """The options that size vLLM's memory for adapters: ranks, slots of the GPU, the host's."""
    later = options.adapter_root is not None
    rank = max((servable.r for servable in servables.values()), default=16)
    slots = min(max(len(servables), LATER if later else 1), MOST_SLOTS)
    if model is not None:
        size = slots * slot_bytes(model, rank) / 1e6
        notices.append(f"{slots} slots of rank {rank} take about {size:,.0f} MB of the GPU")
    if len(servables) > slots:
        notices.append(
            f"a batch holds {slots} of the {len(servables)} adapters: requests for others wait"
        )
    if later:
        notices.append(f"adapters that are loaded later can have ranks up to {rank}")
    limits = {"--max-loras": slots, "--max-lora-rank": rank}
    limits["--max-cpu-loras"] = max(len(servables), slots)
    return ["--enable-lora", *(word for name, n in limits.items() for word in (name, str(n)))]


def _modules(
    servables: Mapping[str, Servable], base: Base, options: VllmOptions, notices: list[str]
) -> list[str]:
    """The values of `--lora-modules`. Their JSON form names the parent in `/v1/models`."""
    modules = []
    for name, servable in servables.items():
        folder = servable.folder.absolute()
        if servable.needs_copy:
            workspace = options.workspace or usable_folder("vllm")
            folder = _copy(servable, workspace.absolute())
            notices.append(
                f"{name} is served from a copy with the same updates, {folder}, as vLLM would "
                f"misread it: {listed(servable.needs_copy)}"
            )
        ends = {path.rpartition(".")[2] for path in servable.plain.pairs}
        if special := sorted(ends.intersection(EMBEDDINGS)):
            notices.append(
                f"{name} adapts {listed(special)}, which vLLM takes for some models only: it says "
                "so when it starts"
            )
        modules.append(lora_module(name, str(folder), base.name))
    return modules


def _copy(servable: Servable, workspace: Path) -> Path:
    """The copy for vLLM, named by what is written into it, so that it is written once."""
    others = [servable.folder / name for name in (CONFIG_NAME, INITIAL_NAME)]
    files = [weights_file(servable.folder), *others]
    digests = [sha256(file) for file in files if file.is_file()]
    written = "".join([*digests, *servable.plain.notices])  # these tell of other names
    digest = hashlib.sha256(written.encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", servable.folder.absolute().name)[:80]
    folder = workspace / f"{readable}-{digest}"
    if not folder.is_dir():
        write_copy(servable, folder)
    return folder


def _environment(options: VllmOptions, notices: list[str]) -> dict[str, str]:
    """What vLLM takes from variables: the key, which a command line would show to everybody."""
    environment = {"VLLM_NO_USAGE_STATS": "1"}  # it reports to its makers otherwise
    later = options.adapter_root is not None
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = str(later)
    if options.api_key is not None:
        environment["VLLM_API_KEY"] = options.api_key
        notices.append(
            "vLLM asks for the key under /v1 only: let a proxy pass nothing else to other machines"
            if not is_loopback(options.host)
            else "vLLM asks for the key under /v1 only"
        )
    elif os.environ.get("VLLM_API_KEY"):
        notices.append("VLLM_API_KEY is set here, so vLLM will ask for that key")
    if later:
        notices.append(
            "vLLM has neither --admin-key nor --adapter-root: whoever has the API key can load "
            "adapters, from any folder that the server can read and from the hub, and unload them; "
            "they are not checked (lorakit export ADAPTER --to vllm makes one that is read right)"
        )
    return environment
