"""The process that renders chat templates for `bounded_templates.py`, which ends it when it must.

It is a script that imports jinja2 and nothing else, so that it starts in a tenth of a second and
its memory can be limited. What templates find in it is what transformers gives them. Frames go both
ways, each with its length before it: requests are pickles, replies a letter and text.
"""

import json
import pickle
import sys
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

MEMORY = 1 << 29
"""Bytes of address space, most of which are left for the template."""
LONGEST = 1 << 27
"""Bytes of rendered text."""
_SPARE_SECONDS = 2


@lru_cache(maxsize=32)
def compiled(template: str) -> Any:
    """A template in transformers' environment for chat templates."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what the model writes, as its content."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> Any:
            return caller()

    class Dict:
        def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
            return dict(*args, **fields)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **fields: Any) -> None:
            self, *given = args
            values = dict(*given, **fields)
            for name in values:
                PlainNamespace._check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": PlainNamespace,
    }
    return environment.from_string(template)


def free_variables(template: str) -> set[str]:
    """The variables that a template reads and does not set itself.

    Not only rendering takes time: jinja2 computes what is constant while it looks for them.
    """
    from jinja2 import meta, nodes

    environment = compiled("").environment
    tree = environment.parse(template)
    found = meta.find_undeclared_variables(tree)
    # jinja2 counts a name that is set on some branches alone. It is a user's if the template
    # asks whether it is there, or gives it a default.
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        name.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined")
        for name in test.find_all(nodes.Name)
    }
    for default in tree.find_all(nodes.Filter):
        if default.name in ("default", "d") and isinstance(default.node, nodes.Name):
            asked.add(default.node.name)
    return found - (own - asked) - environment.globals.keys()


def answer(template: str, variables: dict[str, Any] | None) -> tuple[bytes, bytes]:
    """`t` and the text, or `e` and what went wrong.

    Args:
        variables: what to render with; None asks for the names that the template reads.
    """
    try:
        if variables is None:
            return b"t", " ".join(sorted(free_variables(template))).encode()
        text = compiled(template).render(**variables).encode("utf-8", "surrogatepass")
        if len(text) > LONGEST:
            return b"e", b"it writes more than %d bytes" % LONGEST
        return b"t", text
    except MemoryError:
        return b"e", b"it takes more than %d bytes of memory" % MEMORY
    except BaseException as error:  # a template is someone's program: it may raise anything
        said = str(error)[:10_000] or type(error).__name__
        return b"e", said.encode("utf-8", "surrogatepass")


def read_exactly(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    body = stream.read(length)
    return body if len(body) == length else None


def write_frame(stream: IO[bytes], *parts: bytes) -> None:
    """Sends the parts as one frame."""
    stream.write(sum(map(len, parts)).to_bytes(8, "little"))
    for part in parts:
        stream.write(part)
    stream.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: the text's length and the time are limited all the same
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):  # as on macOS
        return


def main(places: list[str]) -> None:
    """Answers requests (a template, its variables, seconds that it may take) until the last one.

    A rendering that takes much longer ends this process, should nobody else do that.

    Args:
        places: where jinja2 may lie, if it is not found.
    """
    import signal

    sys.path += places
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who wait for the text
    timer = getattr(signal, "setitimer", None)
    compiled("")  # so that everything is imported before memory is limited
    _limit_memory()
    inward, outward = sys.stdin.buffer, sys.stdout.buffer
    write_frame(outward, b"r")
    while (request := read_exactly(inward)) is not None:
        template, variables, seconds = pickle.loads(request)
        if timer:
            timer(signal.ITIMER_REAL, seconds + _SPARE_SECONDS)
        kind, text = answer(template, variables)
        if timer:
            timer(signal.ITIMER_REAL, 0)
        write_frame(outward, kind, text)


if __name__ == "__main__":
    main(sys.argv[1:])
