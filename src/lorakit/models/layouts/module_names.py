"""Module names that differ between a layout's own code and transformers' model, as one table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModuleNames:
    """Which module of a layout's own code is which of transformers'.

    Attributes:
        code: what messages call the layout's own code.
        models: the models that it is the code of, in a sentence.
        config: the name of transformers' configuration class of these models.
        layers, native_layers: where the numbered layers are, there and in transformers.
        in_layer: a layer's modules, by transformers' name.
        outside: the modules outside the layers, by transformers' path.
        fused: modules of a layer that are several in transformers, in the order of their rows.
        tool: what adapters that PEFT trained on that code are called.
        command: Python that loads an adapter on that code, with `{base}` and `{adapter}`.
        templates: what that code does about chat templates.
    """

    code: str
    models: str
    config: str
    layers: str
    native_layers: str
    in_layer: Mapping[str, str]
    outside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tool: str = ""
    command: str = ""
    templates: str = ""

    def original_module(self, native: str) -> tuple[str, str | None]:
        """The original module's path for a native one, and which part of a fused one it is.

        Raises:
            KeyError: there is no such module.
        """
        if native in self.outside:
            return self.outside[native], None
        number, _, rest = native.removeprefix(f"{self.native_layers}.").partition(".")
        if native.startswith(f"{self.native_layers}.") and number.isdecimal():
            for name, parts in self.fused.items():
                if rest in parts:
                    return f"{self.layers}.{number}.{name}", rest
            if rest in self.in_layer:
                return f"{self.layers}.{number}.{self.in_layer[rest]}", None
        raise KeyError(native)

    def native_modules(self, original: str) -> tuple[str, list[str], str]:
        """What an original module, or a tensor of one, is in transformers.

        Args:
            original: the module's path, or a tensor's name that begins with it.

        Returns: the original module's path, those of the native ones, and the rest of `original`.

        Raises:
            KeyError: there is no such module.
        """
        for native, path in self.outside.items():
            if original == path or original.startswith(f"{path}."):
                return path, [native], original[len(path) + 1 :]
        parts = {**self.fused, **{path: (native,) for native, path in self.in_layer.items()}}
        known = "|".join(map(re.escape, parts))
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.({known})(?:\.(.+))?", original)
        if match is None:
            raise KeyError(original)
        layer, path, rest = match.groups()
        natives = [f"{self.native_layers}.{layer}.{native}" for native in parts[path]]
        return f"{self.layers}.{layer}.{path}", natives, rest or ""

    def native_names(self, original: str) -> list[str]:
        """The last parts of the native modules' names for that of an original one, or its path.

        A name that is none of them stays as it is.
        """
        parts = {part: name for name, natives in self.fused.items() for part in natives}
        every = {**self.outside, **self.in_layer, **parts}
        last = original.rpartition(".")[2]
        found = [n.rpartition(".")[2] for n, o in every.items() if o.rpartition(".")[2] == last]
        return list(dict.fromkeys(found)) or [original]
