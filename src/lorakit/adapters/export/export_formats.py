"""The forms that `lorakit export --to` writes: one file of this folder a program, one line here.

A writer is `write(adapter, output, *, base, **options) -> Exported`; its module is imported when it
is used, so that the help needs none of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lorakit.errors import InputError


@dataclass(frozen=True)
class Exported:
    """What was written, the lines that say so, and the command that uses it.

    `figures` are the numbers behind `summary`; `notices` are the user's.
    """

    output: str
    summary: str
    command: str
    notices: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportFormat:
    """One value of `--to`.

    Attributes:
        writer: `module:function`.
        options: those of the verb's options that the writer takes: `merged`, `dtype`, `system`.
    """

    name: str
    writer: str
    options: frozenset[str] = frozenset()

    def write(
        self, adapter: str | Path, output: str | Path, base: str | None = None, **options: Any
    ) -> Exported:
        """Writes the adapter in this form.

        Args:
            base: the base model, when it is not the recorded one.
            options: None and False are as not given.

        Raises:
            InputError: an option has no effect, or the adapter cannot be written so.
        """
        given = {name: value for name, value in options.items() if value not in (None, False)}
        for name in given:
            if name not in self.options:
                raise InputError(f"--{name} has no effect with --to {self.name}: leave it out")
        from lorakit.adapters.joined import joined

        module, _, function = self.writer.partition(":")
        write = getattr(import_module(module), function)
        # With the frozen adapters that it is added to, which merging adds by itself.
        one = nullcontext(adapter) if given.get("merged") else joined(adapter)
        with one as whole:
            done: Exported = write(whole, output, base=base, **given)
        return done


FORMATS: dict[str, ExportFormat] = {}
"""By name, in the order of the help."""


def register(name: str, writer: str, *options: str) -> None:
    """Adds a form; `writer` and `options` are as in `ExportFormat`."""
    FORMATS[name] = ExportFormat(name, writer, frozenset(options))


register("gguf", "lorakit.adapters.export.gguf_files:export_gguf", "merged", "dtype")
register("ollama", "lorakit.adapters.export.ollama:export_ollama", "merged", "dtype", "system")
register("vllm", "lorakit.adapters.export.vllm:export_vllm")
register("mlx", "lorakit.adapters.export.mlx:export_mlx")
register("chatglm", "lorakit.adapters.export.chatglm:export_chatglm")
