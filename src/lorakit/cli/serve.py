"""`lorakit serve`: adapters and their base behind OpenAI's API."""

from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.shared_options import (
    BaseOption,
    DtypeOption,
    QuantizationOption,
    SpeculativeConfigOption,
    WeightsOption,
)
from lorakit.console import say, say_all
from lorakit.errors import InputError

_TEXT_BODY = 4 << 20
_LARGE_BODY = 32 << 20
"""For pictures, and rows of a batch to train on, which the SDK sends in parts of about 5 MB."""


class EngineName(StrEnum):
    """The inference engine."""

    LORAKIT = "lorakit"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER | NAME=PATH]...",
            help="Adapters' folders; `model` names them by the folder's name, or NAME.",
        ),
    ] = None,
    model: BaseOption = None,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; one that other machines reach needs --api-key."
        ),
    ] = "127.0.0.1",
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A host name that the server answers to, beside localhost; repeatable."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LORAKIT_API_KEY",
            help="An API key that requests may send; repeatable.",
            show_default=False,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="A file of API keys: a line each, KEY or NAME KEY."),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="LORAKIT_ADMIN_KEY",
            help="The key for loading and unloading adapters, and for what all API keys have.",
            show_default=False,
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="The folder that adapters may be loaded from at run time.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the one adapter into the base, for full speed.")
    ] = False,
    max_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The batch size: answers generated at once. Default: as many as fit into memory, "
            "16 to 64.",
            show_default=False,
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum tokens of prompt and answer. Default: the model's."),
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    weights: WeightsOption = None,
    speculative_config: SpeculativeConfigOption = None,
    max_body: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum bytes of a request's body. Default: 4 MiB, 32 MiB with pictures.",
            show_default=False,
        ),
    ] = None,
    max_images: Annotated[
        int, typer.Option(min=0, help="Maximum pictures in a request; 0 takes none.")
    ] = 16,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum bytes of a picture's file.")
    ] = 20 << 20,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum pixels of a request's pictures together.")
    ] = 40_000_000,
    fetch_images: Annotated[
        bool,
        typer.Option(
            "--fetch-images", help="Fetch pictures at public web addresses that requests name."
        ),
    ] = False,
    image_host: Annotated[
        list[str] | None,
        typer.Option(
            help="With --fetch-images: fetch from this host alone, also a private one; repeatable."
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Maximum answers in the queue for the batch.")
    ] = 256,
    max_requests: Annotated[int, typer.Option(min=1, help="Maximum concurrent requests.")] = 512,
    max_connections: Annotated[int, typer.Option(min=1, help="Maximum open connections.")] = 2048,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Maximum seconds for an answer, in the queue included.")
    ] = 600,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Compute what prompts begin with once for each adapter.",
        ),
    ] = True,
    prefix_cache_mb: Annotated[
        int, typer.Option(min=1, help="Maximum megabytes of the prefix cache.")
    ] = 512,
    training: Annotated[
        bool,
        typer.Option("--training", help="Offer the training service: the Tinker SDK's API."),
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="With --training: the folder of checkpoints. Default: runs/service."),
    ] = None,
    max_models: Annotated[
        int, typer.Option(min=1, help="With --training: maximum models of an API key at once.")
    ] = 64,
    max_tokens_in_flight: Annotated[
        int,
        typer.Option(min=1, help="With --training: maximum tokens of a key's pending requests."),
    ] = 4 << 20,
    max_disk: Annotated[
        int,
        typer.Option(min=0, help="With --training: maximum bytes of a key's checkpoints; 0 = any."),
    ] = 0,
    max_adapter_memory: Annotated[
        int,
        typer.Option(
            min=1,
            help="With --training: maximum bytes of adapters in memory, gradients and optimizer "
            "state included; the others wait on disk.",
        ),
    ] = 4 << 30,
    drain: Annotated[
        float, typer.Option(min=0, help="On SIGTERM, seconds for running answers to finish.")
    ] = 30,
    engine: Annotated[EngineName, typer.Option(help="The inference engine.")] = (
        EngineName.LORAKIT
    ),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="With --engine vllm: print the command without running it."),
    ] = False,
) -> None:
    """Serve a base model and its adapters with OpenAI's API.

    A page to compare adapters is at /.
    """
    from lorakit.engine.adapter_names import named_adapters

    named = named_adapters(adapters or [])
    if not named and model is None:
        raise InputError("nothing to serve: give adapters' folders, or --model")
    if engine is EngineName.VLLM:
        from lorakit.server import vllm

        _refuse_for_vllm(context)

        if api_keys is not None or len(api_key or ()) > 1:
            raise InputError("vLLM takes one --api-key: several are for --engine lorakit")
        options = vllm.VllmOptions(
            model=model,
            adapters=named,
            host=host,
            port=port,
            api_key=api_key[0] if api_key else None,
            admin_key=admin_key,
            adapter_root=adapter_root,
            context_length=context_length,
            dtype=dtype,
            enable_prefix_caching=enable_prefix_caching,
        )
        vllm.serve(options, dry_run=dry_run)
        return
    if dry_run:
        raise InputError("--dry-run prints vLLM's command: give --engine vllm too")
    if merged and adapter_root is not None:
        raise InputError("--merged serves a single adapter: leave --adapter-root out")
    if state is not None and not training:
        raise InputError("--state is the training service's folder: give --training too")
    if image_host and not fetch_images:
        raise InputError("--image-host says where pictures are fetched: give --fetch-images too")
    if merged and training:
        raise InputError("--merged serves a single adapter and trains none: leave --training out")
    try:
        from lorakit.server.options import (
            ApiKey,
            Limits,
            ServerOptions,
            TrainingLimits,
            read_keys,
        )
        from lorakit.server.run import run, show_log
    except ModuleNotFoundError as error:
        raise InputError(
            f"lorakit serve needs {error.name}: pip install 'lorakit[serve]'"
        ) from error
    from lorakit.engine.open_engine import open_engine
    from lorakit.engine.speculation import NgramSpeculation
    from lorakit.models.picture_reader import reader_of

    # Refused before a model is loaded.
    speculation = NgramSpeculation.from_json(speculative_config) if speculative_config else None
    keys = [ApiKey(value) for value in api_key or ()]
    keys += read_keys(api_keys) if api_keys is not None else []
    server_options = ServerOptions(
        host=host,
        port=port,
        api_keys=tuple(keys),
        admin_key=admin_key,
        adapter_root=adapter_root,
        allowed_hosts=tuple(allowed_host or ()),
        drain=drain,
        training_state=(state or Path("runs/service")) if training else None,
        fetch_from=tuple(image_host or ()) if fetch_images else None,
        training_limits=TrainingLimits(
            models=max_models,
            tokens=max_tokens_in_flight,
            disk_bytes=max_disk,
            memory_bytes=max_adapter_memory,
        ),
        limits=Limits(
            body_bytes=max_body or _TEXT_BODY,
            waiting=max_waiting,
            requests=max_requests,
            connections=max_connections,
            request_seconds=request_timeout,
            images=max_images,
            image_bytes=max_image_bytes,
            image_pixels=max_image_pixels,
        ),
    )
    if training:
        from lorakit.training.machine import settle_in

        settle_in()
    opened = open_engine(
        model,
        named,
        dtype=dtype,
        quantization=quantization,
        weights=weights,
        max_rows=max_rows,
        context_length=context_length,
        merged=merged,
        prefix_bytes=prefix_cache_mb << 20 if enable_prefix_caching else 0,
        embeds=not training,
        speculation=speculation,
    )
    pictured = reader_of(opened.tokenizer) is not None and max_images > 0
    if training or (pictured and max_body is None):
        body = max(server_options.limits.body_bytes, _LARGE_BODY)
        limits = replace(server_options.limits, body_bytes=body)
        server_options = replace(server_options, limits=limits)
    say_all(opened.notices)
    if training:
        show_log("lorakit.training")
    names = ", ".join(named) if named and not merged else ""

    def started(address: str) -> None:
        what = opened.model_name + (f" with {names}" if names else "")
        say(f"serving {what} at {address} (Ctrl-C ends)")

    run(opened, server_options, started, exits=True)


def _refuse_for_vllm(context: typer.Context) -> None:
    """Raises InputError for an option that is our own engine's alone."""
    from lorakit.server.vllm import VllmOptions

    shared = {field.name for field in fields(VllmOptions)} | {"engine", "dry_run"}
    for name in (name for name in context.params if name not in shared):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for --engine lorakit: vLLM has options of its own")
