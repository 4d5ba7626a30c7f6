"""Malformed data files and recipes, each with a name and what should be said of it.

A case writes into an empty folder and says what a recipe would name. `rows.jsonl:3` and the like
are among the words wherever there is a line. What each is run through is in `test_malformed`.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = {"prompt": "q", "completion": "a"}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RECIPE = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "o"}


@dataclass(frozen=True)
class Case:
    """`write` returns the recipe's data section (or its `data.train`), or overrides of a recipe.

    `words` are in the one line of the refusal or, where the case is `accepted`, of a notice.
    """

    name: str
    write: Callable[[Path], Any]
    words: tuple[str, ...]
    accepted: bool = False


def data_cases() -> Iterator[Case]:
    """Everything that is wrong with rows, files, folders and what they are mixed with."""
    yield from _json_lines()
    yield from _json()
    yield from _csv()
    yield from _packed()
    yield from _parquet()
    yield from _rows()
    yield from _tools()
    yield from _odd_but_accepted()
    yield from _paths()
    yield from _mixing()


def recipe_cases() -> Iterator[Case]:
    """Everything that is wrong with a recipe's file and with values given over it."""
    yield from _recipe_files()
    yield from _overrides()


def _file(name: str, file: str, content: bytes | str, *words: str) -> Case:
    def write(folder: Path) -> str:
        data = content.encode() if isinstance(content, str) else content
        (folder / file).write_bytes(data)
        return str(folder / file)

    return Case(name, write, (file, *words))


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _row(name: str, values: Any, *words: str, accepted: bool = False) -> Case:
    """Two good rows, and then this one."""
    content = _lines(GOOD, {**GOOD, "prompt": "q2"}, values)
    place = () if accepted else (":3",)
    case = _file(name, "rows.jsonl", content, *place, *words)
    return Case(name, case.write, case.words, accepted)


def _json_lines() -> Iterator[Case]:
    good = _lines(GOOD)
    at_2 = {
        "cut in an object": ('{"prompt": "q", "compl', "broken JSON"),
        "cut in an escape": ('{"prompt": "q\\u00', "broken JSON"),
        "single quotes": ("{'prompt': 'q', 'completion': 'a'}", "broken JSON"),
        "Python's None": ('{"prompt": "q", "completion": None}', "broken JSON"),
        "a comment": ('// a comment\n{"prompt": "q", "completion": "a"}', "broken JSON"),
        "bare keys": ('{prompt: "q", completion: "a"}', "broken JSON"),
        "a trailing comma": ('{"prompt": "q", "completion": "a",}', "broken JSON"),
        "a comma behind the row": ('{"prompt": "q", "completion": "a"},', "text after"),
        "two rows on a line": ('{"a": 1} {"a": 2}', "text after the object"),
        "rows parted by carriage returns": ('{"a": 1}\r{"a": 2}', "text after the object"),
        "rows parted by U+2028": ('{"a": 1}\u2028{"a": 2}', "text after the object"),
        "null for a row": ("null", "must be an object"),
        "a number for a row": ("5", "must be an object"),
        "a text for a row": ('"q"', "must be an object"),
        "a list for a row": ('["q", "a"]', "must be an object"),
        "NaN": ('{"prompt": NaN}', "NaN is not JSON"),
        "Infinity": ('{"prompt": Infinity}', "Infinity is not JSON"),
        "minus Infinity": ('{"prompt": -Infinity}', "-Infinity is not JSON"),
        "a number past infinity": ('{"prompt": 1e999}', "1e999 is too large"),
        "a number of 5000 digits": ('{"prompt": ' + "9" * 5000 + "}", "4300 digits"),
        "a key twice": ('{"prompt": "q", "prompt": "r"}', "'prompt' occurs twice"),
        "a key twice in a message": (
            '{"messages": [{"role": "user", "role": "assistant"}]}',
            "'role' occurs twice",
        ),
        "200,000 brackets": ('{"prompt": ' + "[" * 200_000, "nested too deeply"),
        "200,000 objects": ('{"a": ' * 200_000, "nested too deeply"),
        "a raw line end in a text": ('{"prompt": "q\n"}', "broken JSON"),
        "a raw tab in a text": ('{"prompt": "q\t"}', "control character at"),
        "a raw escape character in a text": ('{"prompt": "\x1b[0m"}', "control character at"),
        "an escape that JSON has not": ('{"prompt": "\\x41"}', "Invalid"),
        "a row over several lines": ('{\n"prompt": "q"\n}', "one object a line"),
        "an ellipsis": ("...", "broken JSON"),
        "a merge conflict": ("<<<<<<< HEAD", "broken JSON"),
        "a byte order mark": ('\ufeff{"prompt": "q", "completion": "a"}', "byte order mark"),
    }
    for name, (line, word) in at_2.items():
        yield _file(f"jsonl with {name}", "rows.jsonl", f"{good}{line}\n", "rows.jsonl:2", word)
    for name, content, word in (
        ("latin-1", '{"prompt": "é"}'.encode("latin-1"), "UTF-8"),
        ("cp1252", '{"prompt": "“q”"}'.encode("cp1252"), "UTF-8"),
        ("shift-jis", '{"prompt": "日本"}'.encode("shift-jis"), "UTF-8"),
        ("gb18030", '{"prompt": "你好"}'.encode("gb18030"), "UTF-8"),
        ("half a character", '{"prompt": "é'.encode()[:-1], "UTF-8"),
        ("an encoded surrogate", b'{"prompt": "\xed\xa0\xbd"}', "UTF-8"),
        ("an overlong slash", b'{"prompt": "\xc0\xaf"}', "UTF-8"),
        ("a NUL byte", b'{"prompt": "\x00"}', "NUL byte"),
    ):
        yield _file(f"jsonl with {name}", "rows.jsonl", good.encode() + content, ":2", word)
    for name, content in (
        ("UTF-16", good.encode("utf-16")),
        ("UTF-16 without a mark", good.encode("utf-16-be")),
        ("UTF-32", good.encode("utf-32")),
        ("zeros", bytes(4096)),
        ("a zip archive", b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(20)),
        ("a gzip file", gzip.compress(good.encode())),
        ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(20)),
        ("a web page", "<!DOCTYPE html><html><body>404</body></html>"),
        ("a table", "prompt,completion\nq,a\n"),
        ("YAML", "- prompt: q\n  completion: a\n"),
        ("a large file's pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("one array", json.dumps([GOOD])),
        ("prose", "Once upon a time.\n"),
    ):
        yield _file(f"jsonl that is {name}", "rows.jsonl", content, "rows.jsonl:1")
    yield _file("jsonl of nothing", "rows.jsonl", "", "no rows")
    yield _file("jsonl of blank lines", "rows.jsonl", "\n \r\n\t\n", "no rows")
    yield _file("jsonl of a byte order mark", "rows.jsonl", "\ufeff", "no rows")


def _json() -> Iterator[Case]:
    for name, content, *words in (
        ("nothing", "", "no rows"),
        ("an empty array", "[]", "no rows"),
        ("an object around the rows", '{"data": [{"a": 1}]}', ":1", "one array"),
        ("columns of lists", '{"prompt": ["q"], "completion": ["a"]}', ":1", "one array"),
        ("json lines", _lines(GOOD, GOOD), ":1", ".jsonl"),
        ("a text", '"rows"', ":1", "one array"),
        ("a number", "5", ":1", "one array"),
        ("no comma between rows", '[{"a": 1}\n{"a": 2}]', ":2", "expected ','"),
        ("a trailing comma", '[{"a": 1},\n]', ":2", "broken JSON"),
        ("no closing bracket", '[{"a": 1}\n', ":2", "']'"),
        ("an opening bracket alone", "[", ":1", "broken JSON"),
        ("text behind the array", '[{"a": 1}]\nend', "after the array"),
        ("a number among the rows", '[{"a": 1},\n5]', ":2", "must be an object"),
        ("null among the rows", '[{"a": 1},\nnull]', ":2", "must be an object"),
        ("lists for rows", '[["q", "a"]]', ":1", "must be an object"),
        ("NaN", '[\n{"prompt": NaN}]', ":2", "NaN"),
        ("a key twice", '[\n\n{"a": 1, "a": 2}]', ":3", "occurs twice"),
        ("deep nesting", '[{"a": ' + "[" * 100_000, ":1", "nested too deeply"),
        ("a cut text", '[{"prompt": "q', ":1", "broken JSON"),
        ("latin-1", '[\n{"prompt": "é"}]'.encode("latin-1"), ":2", "UTF-8"),
    ):
        yield _file(f"json of {name}", "rows.json", content, *words)


def _csv() -> Iterator[Case]:
    head = "prompt,completion\nq,a\n"
    for name, content, *words in (
        ("nothing", "", "no rows"),
        ("a header alone", "prompt,completion\n", "no rows"),
        ("a row too long", head + "q,a,b\n", ":3", "3 columns", "header has 2"),
        ("a row too short", head + "q\n", ":3", "1 columns", "header has 2"),
        ("an open quote", head + '"q,a\n', ":3", "quotes"),
        ("a quote inside", head + 'q,"a"b\n', ":3", "quotes"),
        ("a column twice", "prompt,prompt\nq,a\n", ":1", "two columns", "'prompt'"),
        ("semicolons", "prompt;completion\nq;a\n", ":1", "';'"),
        ("bars", "prompt|completion\nq|a\n", ":2", "fit no format"),
        ("tabs", "prompt\tcompletion\nq\ta\n", ":2", "fit no format"),
        ("no header", "q,a\nq2,a2\n", ":2", "fit no format"),
        ("Excel's separator line", "sep=,\nprompt,completion\n", ":2", "fit no format"),
        ("a field of 200,000", head + "q," + "x" * 200_000, ":3", ".jsonl"),
        ("a NUL byte", head + "q,\0\n", ":3", "NUL"),
        ("latin-1", (head + "é,a\n").encode("latin-1"), ":3", "UTF-8"),
        ("UTF-16", head.encode("utf-16"), ":1", "UTF-8"),
        ("a workbook", b"PK\x03\x04\x14\x00\x06\x00" + bytes(9), ":1", "NUL"),
        ("an empty prompt", head + ",a\n", ":3", "user message is empty"),
        ("capitals in the header", "Prompt,Completion\nq,a\n", ":2", "fit no format"),
    ):
        yield _file(f"csv with {name}", "rows.csv", content, *words)
    yield _file("tsv with commas", "rows.tsv", head, ":2", "fit no format")
    yield _file("tsv with a row too long", "rows.tsv", "prompt\tcompletion\na\tb\tc\n", ":2", "tab")
    yield _file("tsv with an open quote", "rows.tsv", 'text\n"q\n', ":2", "quotes")


def _packed() -> Iterator[Case]:
    good = gzip.compress(_lines(GOOD).encode())
    damaged = good[:-8] + bytes(8)
    for name, file, content, *words in (
        ("no gzip at all", "rows.jsonl.gz", _lines(GOOD), "gzip"),
        ("cut gzip", "rows.jsonl.gz", good[:-12], "gzip"),
        ("gzip with a wrong checksum", "rows.jsonl.gz", damaged, "gzip"),
        ("gzip with text behind", "rows.jsonl.gz", good + b"end", "gzip"),
        ("gzip of nothing", "rows.jsonl.gz", gzip.compress(b""), "no rows"),
        ("gzip of zero bytes", "rows.jsonl.gz", b"", "rows.jsonl.gz"),
        ("gzip of gzip", "rows.jsonl.gz", gzip.compress(good), ":1", "UTF-8"),
        ("gzip of broken JSON", "rows.jsonl.gz", gzip.compress(b'\n{"a":'), ":2", "broken"),
        ("gzip of a broken array", "rows.json.gz", gzip.compress(b"[{]"), ":1", "broken"),
        ("gzip of a ragged table", "rows.csv.gz", gzip.compress(b"a,b\n1\n"), ":2", "columns"),
        ("gzip of Parquet", "rows.parquet.gz", good, "not a known file type"),
        ("a packed archive", "rows.tar.gz", good, "not a known file type"),
        ("bzip2", "rows.jsonl.bz2", good, "not a known file type"),
        ("zstd", "rows.jsonl.zst", good, "not a known file type"),
        ("zip", "rows.zip", good, "not a known file type"),
    ):
        yield _file(name, file, content, *words)
    for file in ("rows.jsonl.gz", "rows.csv.gz", "rows.json.gz"):

        def write(folder: Path, file: str = file) -> str:
            (folder / file).write_bytes(_bomb())
            return str(folder / file)

        yield Case(f"a zip bomb in {file}", write, (file, "unpacks to more than 128 MiB"))


@cache
def _bomb() -> bytes:
    """129 MiB of zeros, packed."""
    return gzip.compress(bytes(129 << 20), compresslevel=1)


def _parquet() -> Iterator[Case]:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"] * 100}), buffer)
    whole = buffer.getvalue().to_pybytes()
    for name, content in (
        ("nothing", b""),
        ("text", b"PAR1 nonsense PAR1"),
        ("cut at the end", whole[:-20]),
        ("cut at the start", whole[20:]),
        ("with a damaged page", whole[:10] + bytes(40) + whole[50:]),
        ("with a damaged footer", whole[:-60] + bytes(40) + whole[-20:]),
    ):
        yield _file(f"parquet of {name}", "rows.parquet", content, "not a readable Parquet file")
    once = pa.array(["q", "q2"])
    for name, table, *words in (
        ("a column twice", pa.table([once, once], ["text", "text"]), "two columns", "'text'"),
        ("no rows", pa.table({"text": pa.array([], pa.string())}), "no rows"),
        ("numbers", pa.table({"text": [1, 2]}), ":1", "a number"),
        ("NaN", pa.table({"text": [float("nan")]}), ":1", "null"),
        ("true and false", pa.table({"text": [True]}), ":1", "true or false"),
        ("bytes", pa.table({"text": [b"q"]}), ":1", "binary"),
        ("times", pa.table({"text": pa.array([0], pa.timestamp("s"))}), ":1", "datetime"),
        ("decimals", pa.table({"text": pa.array([1]).cast(pa.decimal128(20))}), ":1", "Decimal"),
        ("null", pa.table({"prompt": once, "completion": ["a", None]}), ":2", "null"),
        ("nulls alone", pa.table({"text": pa.nulls(2)}), ":1", "null"),
        ("lists of numbers", pa.table({"messages": [[1, 2]]}), ":1", "messages[0] is a number"),
        ("a struct for messages", pa.table({"messages": [TALK[0]]}), ":1", "is an object"),
        (
            "a map for messages",
            pa.table({"messages": pa.array([[("user", "q")]], pa.map_(pa.string(), pa.string()))}),
            ":1",
            "is an object",
        ),
        ("a list of columns", pa.table({"conversations": [{"from": ["gpt"]}]}), ":1", "an object"),
        (
            "messages without content",
            pa.table({"messages": [[TALK[0], {"role": "assistant", "content": None}]]}),
            ":1",
            "messages[1] has no 'content'",
        ),
        ("nested lists", pa.table({"messages": [[TALK]]}), ":1", "messages[0] is a list"),
        (
            "bytes that are no UTF-8",
            pa.table({"text": pa.array([b"\xff"]).view(pa.string())}),
            "not a readable",
        ),
        ("billions of rows", pa.table({"text": pa.nulls(10_000_001)}), "10,000,001 rows"),
        (
            "one text for all rows",
            pa.table({"text": pa.DictionaryArray.from_arrays([0] * 150, ["x" * 1_000_000])}),
            "unpacks to more than 128 MiB",
        ),
        ("no columns that fit", pa.table({"a": once, "b": once}), ":1", "fit no format"),
    ):

        def write(folder: Path, table: pa.Table = table) -> str:
            pq.write_table(table, folder / "rows.parquet")
            return str(folder / "rows.parquet")

        yield Case(f"parquet of {name}", write, ("rows.parquet", *words))


def _rows() -> Iterator[Case]:
    user, answer = TALK
    for name, messages, word in (
        ("null", None, "is null"),
        ("a text", "hi", "is a string"),
        ("a number", 5, "is a number"),
        ("an object", {"role": "user"}, "is an object"),
        ("nothing", [], "no assistant message"),
        ("a question alone", [user], "no assistant message"),
        ("an answer alone", [answer], "nothing comes before"),
        ("a system message and an answer twice", [{"role": "system"}], "no 'content'"),
        ("texts", ["q", "a"], "messages[0] is a string"),
        ("null among them", [user, None, answer], "messages[1] is null"),
        ("lists", [["user", "q"]], "messages[0] is a list"),
        ("no role", [{"content": "q"}, answer], "no 'role'"),
        ("no content", [{"role": "user"}, answer], "no 'content'"),
        ("sharegpt's keys", [{"from": "human", "value": "q"}], "no 'role'"),
        ("a number for a role", [{**user, "role": 1}, answer], "role is a number"),
        ("null for a role", [{**user, "role": None}, answer], "role is null"),
        ("an unknown role", [{**user, "role": "narrator"}, answer], "unknown role 'narrator'"),
        ("a capital role", [{**user, "role": "User"}, answer], "did you mean 'user'"),
        ("a role of 2 MB", [{**user, "role": "x" * 2_000_000}, answer], "unknown role 'xxx"),
        ("null content", [user, {**answer, "content": None}], "content is null"),
        ("a number as content", [user, {**answer, "content": 5}], "content is a number"),
        ("an object as content", [user, {**answer, "content": {}}], "content is an object"),
        ("a place for a picture", [{**user, "content": [{"type": "image"}]}, answer], "1 place"),
        (
            "a picture's link",
            [{**user, "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, answer],
            "no such picture",
        ),
        ("a sound", [{**user, "content": [{"type": "input_audio"}]}, answer], "'input_audio'"),
        ("a part that is a text", [{**user, "content": ["q"]}, answer], "content[0] is a string"),
        ("a part without a type", [{**user, "content": [{"text": "q"}]}, answer], "an object"),
        ("a part of null", [{**user, "content": [{"type": "text"}]}, answer], "text is null"),
        ("no parts", [{**user, "content": []}, answer], "user message is empty"),
        ("an empty question", [{**user, "content": " \n"}, answer], "user message is empty"),
        ("a NUL", [user, {**answer, "content": "a\0"}], "NUL character"),
        ("half a surrogate pair", [{**user, "content": "\ud83d"}, answer], "surrogate"),
        ("a half pair in a further key", [{**user, "name": "\ud83d"}, answer], "name holds half"),
        ("deep nesting in a key", [{**user, "x": _deep(40)}, answer], "nested deeper than 32"),
    ):
        yield _row(f"messages: {name}", {"messages": messages}, word)
    for name, values, word in (
        ("no columns", {}, "(none) fit no format"),
        ("unknown columns", {"mr": "q", "ref": "a"}, "(mr, ref) fit no format"),
        ("a column with a line end", {"a\nb": "q"}, "fit no format"),
        ("200 unknown columns", {f"c{i}": 1 for i in range(200)}, "188 more"),
        ("two formats", {**GOOD, "text": "q a"}, "fit prompt+completion and text"),
        ("completion and response", {**GOOD, "response": "b"}, "fit prompt+completion and"),
        ("prompt alone", {"prompt": "q"}, "fit no format"),
        ("null for a completion", {**GOOD, "completion": None}, "is null"),
        ("a list for a prompt", {**GOOD, "prompt": TALK[:1]}, "two strings or two lists"),
        ("a number for a prompt", {**GOOD, "prompt": 1}, "'prompt' is a number"),
        ("an empty prompt", {**GOOD, "prompt": ""}, "user message is empty"),
        ("true for an answer", {"question": "q", "answer": True}, "true or false"),
        ("a NUL in a prompt", {**GOOD, "prompt": "\0"}, "NUL character"),
        ("a number for the system", {**GOOD, "system": 5}, "'system' is a number"),
        (
            "two systems",
            {"messages": [{"role": "system", "content": "s"}, *TALK], "system": "s"},
            "'system' column",
        ),
        ("alpaca: null output", {"instruction": "q", "output": None}, "'output' is null"),
        ("alpaca: a list of outputs", {"instruction": "q", "output": ["a"]}, "is a list"),
        ("alpaca: a number for input", {"instruction": "q", "input": 1, "output": "a"}, "'input'"),
        ("alpaca: nothing asked", {"instruction": "", "input": "", "output": "a"}, "is empty"),
        (
            "alpaca: history of texts",
            {"instruction": "q", "output": "a", "history": ["x"]},
            "must be a pair",
        ),
        (
            "alpaca: history of halves",
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "must be a pair",
        ),
        (
            "alpaca: a text for history",
            {"instruction": "q", "output": "a", "history": "x"},
            "'history' is not JSON",
        ),
        ("sharegpt: an unknown role", {"conversations": [{"from": "bot", "value": "q"}]}, "'bot'"),
        ("sharegpt: no value", {"conversations": [{"from": "human"}]}, "no 'value'"),
        ("sharegpt: null value", {"conversations": [{"from": "human", "value": None}]}, "is null"),
        ("sharegpt: both keys", {"conversations": [{"from": "human", "role": "user"}]}, "both"),
        (
            "sharegpt: both contents",
            {"conversations": [{"from": "human", "value": "q", "content": "r"}]},
            "both 'value'",
        ),
        ("sharegpt: a dictionary", {"conversations": {"human": "q"}}, "is an object"),
        ("text: nothing", {"text": ""}, "'text' is empty"),
        ("text: blanks", {"text": " \n\t"}, "'text' is empty"),
        ("text: null", {"text": None}, "'text' is null"),
        ("text: a list", {"text": ["a"]}, "'text' is a list"),
        ("text: a NUL", {"text": "a\0b"}, "NUL character"),
        ("text: a half pair", {"text": "\udc00"}, "surrogate"),
    ):
        yield _row(name, values, word)


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _tools() -> Iterator[Case]:
    user, answer = TALK

    def called(call: Any) -> dict[str, Any]:
        return {"messages": [user, {"role": "assistant", "content": None, "tool_calls": call}]}

    for name, call, word in (
        ("a number", 5, "is a number"),
        ("a text that is no JSON", "f(x)", "is not JSON"),
        ("texts", ["f"], "[0] is a string"),
        ("no name", [{"function": {"arguments": {}}}], "has no function name"),
        ("a number for a name", [{"function": {"name": 5}}], "name is a number"),
        ("an empty name", [{"function": {"name": ""}}], "has no function name"),
        ("another type", [{"type": "code", "function": {"name": "f"}}], "'code'"),
        ("arguments that are no JSON", [{"name": "f", "arguments": "{x: 1}"}], "is not JSON"),
        ("arguments that are cut", [{"name": "f", "arguments": '{"x": '}], "is not JSON"),
        ("arguments twice", [{"name": "f", "arguments": '{"x": 1, "x": 2}'}], "occurs twice"),
        ("arguments of NaN", [{"name": "f", "arguments": '{"x": NaN}'}], "NaN"),
        ("a list of arguments", [{"name": "f", "arguments": "[1]"}], "is a list"),
        ("a number for arguments", [{"name": "f", "arguments": 1}], "is a number"),
        ("a NUL in arguments", [{"name": "f", "arguments": {"x": "\0"}}], "NUL character"),
        ("a half pair in a key", [{"name": "f", "arguments": {"\ud800": 1}}], "surrogate"),
        ("deep arguments", [{"name": "f", "arguments": {"x": _deep(60)}}], "deeper than 32"),
        ("endless arguments", [{"name": "f", "arguments": '{"x": ' + "[" * 9999}], "deeply"),
        ("null among them", [None], "[0] is null"),
    ):
        yield _row(f"tool_calls: {name}", called(call), word)
    asked = {"messages": [{**user, "tool_calls": [{"name": "f"}]}, answer]}
    yield _row("tool_calls of a user", asked, "only assistant messages call tools")
    result = {"role": "tool", "content": {"x": 1}}
    yield _row("a tool's result that is no text", {"messages": [user, result, answer]}, "an object")
    yield _row("no calls and no content", called([]), "content is null")
    for name, value, word in (
        ("prose", "I call f", "is not JSON"),
        ("a number", 5, "is a number"),
        ("an empty list", "[]", "has no call"),
        ("no name", '{"arguments": {}}', "has no function name"),
        ("null", None, "is null"),
    ):
        talk = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
        yield _row(f"function_call: {name}", {"conversations": talk}, word)
    for name, tools, word in (
        ("no JSON", "[{name: f}]", "is not JSON"),
        ("a number", 5, "is a number"),
        ("an object", {"name": "f"}, "is an object"),
        ("JSON of an object", '{"name": "f"}', "is an object"),
        ("names alone", ["f"], "is not JSON"),
        ("no name", [{"description": "d"}], "has no function name"),
        ("a list of parameters", [{"name": "f", "parameters": []}], "parameters is a list"),
        ("another type", [{"type": "retrieval"}], "has no function name"),
        ("null among them", [None], "tools[0] is null"),
        ("deep nesting", [{"name": "f", "parameters": {"x": _deep(60)}}], "deeper than 32"),
        ("NaN", '[{"name": "f", "x": NaN}]', "NaN"),
    ):
        yield _row(f"tools: {name}", {"messages": TALK, "tools": tools}, word)


def _odd_but_accepted() -> Iterator[Case]:
    talk = {"messages": TALK}
    for name, values, *words in (
        ("a second format", talk, "several formats", "messages 1"),
        ("a third column", {**GOOD, "score": 5}, "1 column not read: score"),
        (
            "a misspelt column",
            {"instruction": "q", "inputs": "x", "output": "a"},
            "inputs (did you mean 'input'?)",
        ),
        ("a bell", {**GOOD, "prompt": "q\u0007"}, "control characters", "rows.jsonl:3", "\\x07"),
        ("terminal colours", {**GOOD, "prompt": "\u001b[31m"}, "control characters", "\\x1b"),
        ("a C1 control", {"text": "a\u0085b"}, "control characters", "\\x85"),
        ("a turn's end", {**GOOD, "prompt": "q<|im_end|>"}, "special token", "rows.jsonl:3"),
        ("a turn's beginning", {**GOOD, "completion": "<|im_start|>user"}, "'<|im_start|>'"),
        (
            "a special token in a tool",
            {**talk, "tools": [{"name": "f", "description": "<|pad|>"}]},
            "name of a special token",
        ),
        ("a row of 200,000 characters", {**GOOD, "completion": "x" * 200_000}, "max_length"),
        ("an empty answer", {**GOOD, "completion": ""}, "without an answer's text"),
    ):
        case = _row(name, values, accepted=True)
        yield Case(name, case.write, tuple(words), accepted=True)
    index = _file("a table's index", "rows.csv", ",prompt,completion\n0,q,a\n")
    yield Case(index.name, index.write, ("1 column not read",), accepted=True)


def _paths() -> Iterator[Case]:
    def case(name: str, make: Callable[[Path], Any], *words: str, accepted: bool = False) -> Case:
        return Case(
            name, lambda folder: str(make(folder) or folder / "rows.jsonl"), words, accepted
        )

    def link(target: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "rows.jsonl").symlink_to(target)

    def with_files(**files: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            for name, content in files.items():
                (folder / name.replace("_", ".")).write_text(content)
            return folder

        return make

    def shard(make: Callable[[Path], object]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / "a.jsonl").write_text(_lines(GOOD))
            make(folder / "b.jsonl")
            return folder

        return write

    yield case("no file", lambda folder: None, "rows.jsonl: no such file")
    yield case("a link to nowhere", link("nowhere.jsonl"), "broken symbolic link")
    yield case("a link to itself", link("rows.jsonl"), "broken symbolic link")
    yield case("a pipe", lambda folder: os.mkfifo(folder / "rows.jsonl"), "pipe or device")
    yield case("a link to a device", link("/dev/zero"), "pipe or device")
    yield case("a device", lambda _: "/dev/null", "pipe or device")
    yield case("a folder named like a file", lambda f: (f / "rows.jsonl").mkdir(), "data files")
    yield case("an empty folder", lambda folder: folder, "folder without data files")
    yield case("a folder of prose", with_files(README_md="x", a_txt="x"), "objective: pretrain")
    yield case(
        "a folder of two kinds", with_files(a_jsonl=_lines(GOOD), b_csv="a\n"), ".csv and .jsonl"
    )
    yield case(
        "a broken shard",
        with_files(a_jsonl=_lines(GOOD), b_jsonl=_lines(GOOD) + "{"),
        "b.jsonl:2",
        "broken JSON",
    )
    yield case("a shard that is a pipe", shard(os.mkfifo), "b.jsonl", "pipe or device")
    yield case(
        "a shard that is a link",
        shard(lambda p: p.symlink_to("c")),
        "b.jsonl",
        "broken symbolic link",
    )
    yield case(
        "a folder with more in it",
        with_files(a_jsonl=_lines(GOOD), README_md="x"),
        "README.md",
        accepted=True,
    )
    yield case("a path with a NUL", lambda folder: folder / "a\0.jsonl", "control character")
    yield case("a path with a line end", lambda folder: folder / "a\n.jsonl", "control character")
    yield case("a path of 5000 characters", lambda f: f / ("x" * 5000 + ".jsonl"), "too long")
    yield case("a path through a file", _through_a_file, "rows.jsonl")
    yield case("half a surrogate pair in a path", lambda f: f / "\ud800.jsonl", "unicode")
    yield case("an empty path", lambda _: "''", "no such file")
    if Path("/proc/self/mem").exists():  # a file that opens and cannot be read
        yield case("a file that cannot be read", link("/proc/self/mem"), "rows.jsonl", "read")
    for suffix in ("txt", "md"):
        yield _file(f"a .{suffix} file", f"rows.{suffix}", "x", "objective: pretrain", ".jsonl")
    for suffix in ("xlsx", "arrow", "pkl", "pt", "yaml", "db"):
        yield _file(f"a .{suffix} file", f"rows.{suffix}", "x", "not a known file type", ".jsonl")
    yield _file("a file without a suffix", "rows", "x", "suffix", ".jsonl")
    yield from _saved()


def _through_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "rows.jsonl"


def _saved() -> Iterator[Case]:
    def saved(change: Callable[[Path], object]) -> Callable[[Path], str]:
        def write(folder: Path) -> str:
            import datasets

            datasets.disable_progress_bars()
            datasets.Dataset.from_list([GOOD]).save_to_disk(folder / "saved")
            change(folder / "saved")
            return str(folder / "saved")

        return write

    def arrow(folder: Path) -> Path:
        return next(folder.glob("*.arrow"))

    damage: dict[str, Callable[[Path], object]] = {
        "no table": lambda f: arrow(f).unlink(),
        "a cut table": lambda f: arrow(f).write_bytes(arrow(f).read_bytes()[:100]),
        "a table of text": lambda f: arrow(f).write_text("text"),
        "a broken state": lambda f: (f / "state.json").write_text("{"),
        "an empty state": lambda f: (f / "state.json").write_text("{}"),
        "a state of a number": lambda f: (f / "state.json").write_text("5"),
        "no information": lambda f: (f / "dataset_info.json").unlink(),
    }
    for name, change in damage.items():
        yield Case(f"a saved data set with {name}", saved(change), ("saved", "saved data set"))

    def split(folder: Path) -> str:
        return saved(lambda f: None)(folder) + ":test"

    yield Case("a split of what has none", split, ("saved", "without splits", "':test'"))

    def no_train(folder: Path) -> str:
        import datasets

        rows = datasets.Dataset.from_list([GOOD])
        datasets.DatasetDict({"test": rows}).save_to_disk(folder / "saved")
        return str(folder / "saved")

    yield Case("saved splits without train", no_train, ("no split 'train'", "saved:test"))


def _mixing() -> Iterator[Case]:
    def case(name: str, section: Callable[[str], dict[str, Any]], *words: str) -> Case:
        def write(folder: Path) -> dict[str, Any]:
            path = folder / "rows.jsonl"
            path.write_text(_lines(*({**GOOD, "prompt": f"q{i}"} for i in range(4))))
            return section(str(path))

        return Case(name, write, words)

    yield case("a source twice", lambda p: {"train": [p, p]}, "rows.jsonl twice", "weight: 2")
    yield case(
        "a weight that leaves nothing",
        lambda p: {"train": [{"path": p, "weight": 0.01}]},
        "leaves none of its 4 rows",
    )
    yield case("a second source that is not there", lambda p: {"train": [p, p + "x"]}, "rows.jsonl")
    yield case(
        "columns of one source",
        lambda p: {"train": [{"path": p, "columns": {"prompt": "mr"}}]},
        "rows.jsonl:1",
        "no column 'mr'",
    )
    yield case(
        "columns that no format has",
        lambda p: {"train": p, "columns": {"promt": "prompt"}},
        "did you mean 'prompt'",
    )
    yield case(
        "columns of two formats",
        lambda p: {"train": p, "columns": {"prompt": "prompt", "output": "completion"}},
        "no format has all of",
    )
    yield case("an eval file that is not there", lambda p: {"train": p, "eval": "no.csv"}, "no.csv")
    yield case("eval sources twice", lambda p: {"train": p, "eval": [p, p]}, "data.eval", "twice")
    yield case("a share of one row", lambda p: {"train": p, "limit": 1, "eval": 0.5}, "one prompt")
    yield case(
        "rows longer than max_length", lambda p: {"train": p, "max_length": 9}, ":1", "raise"
    )


def _recipe_files() -> Iterator[Case]:
    whole = "model: m\ndata: {train: a}\noutput_dir: o\n"
    aliases = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    merges = "a: &a {x: 1}\n" + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}], {b}: 1}}\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for name, content, *words in (
        ("nothing", "", "a mapping of keys"),
        ("comments alone", "# nothing\n", "a mapping of keys"),
        ("a list", "- a\n- b\n", "a mapping of keys"),
        ("a text", "hello\n", "a mapping of keys"),
        ("a number", "5\n", "a mapping of keys"),
        ("a key twice", f"{whole}model: n\n", "line 4", "'model' occurs twice"),
        ("a key twice below", "data: {train: a, train: b}\n", "line 1", "'train' occurs twice"),
        ("a tab", "model: m\ndata:\n\ttrain: a\n", "line 3", "not valid YAML"),
        ("an open bracket", "model: [m\n", "not valid YAML"),
        ("an open brace", "data: {train: a\n", "not valid YAML"),
        ("an open quote", 'model: "m\n', "not valid YAML"),
        ("two colons", "model: m: n\n", "line 1", "not valid YAML"),
        ("wrong indentation", "data:\n  train: a\n eval: b\n", "line 3", "not valid YAML"),
        ("a Python object", "model: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        ("an unknown tag", "model: !thing m\n", "not valid YAML"),
        ("an impossible date", "output_dir: 2024-99-99\n", "not valid YAML"),
        ("a broken binary", "model: !!binary x\n", "not valid YAML"),
        ("an unknown alias", "model: *m\n", "not valid YAML"),
        ("an alias in itself", "lora: &l {x: *l}\n", "an alias inside itself"),
        ("a list in itself", "lora: &l [*l]\n", "an alias inside itself"),
        ("a billion values by aliases", aliases, "more than 10,000 values"),
        ("a billion keys by merging", merges, "more than 10,000 values"),
        ("3000 brackets", "model: " + "[" * 600, "nested too deeply"),
        ("1 MB", "# " + "x" * 1_000_000, "larger than 64 KiB"),
        ("a NUL", "model: m\0\n", "0x0000", "remove it"),
        ("an escape character", "model: \x1b[0m\n", "0x001b", "remove it"),
        ("latin-1", "model: é\n".encode("latin-1"), "UTF-8"),
        ("UTF-16", whole.encode("utf-16"), "UTF-8"),
        ("random bytes", bytes(range(128, 256)), "UTF-8"),
        ("two documents", f"{whole}---\nmodel: n\n", "not valid YAML"),
        ("a number for a key", f"{whole}5: x\n", "5 is not a recipe key"),
        ("null for a key", f"{whole}null: x\n", "is not a recipe key"),
        ("a list for a key", f"{whole}[a]: x\n", "not valid YAML"),
        ("an unknown key", f"{whole}modle: x\n", "did you mean 'model'"),
        ("an unknown section", f"{whole}trainer: {{}}\n", "use training"),
        ("no data", "model: m\noutput_dir: o\n", "data is missing"),
        ("no model", "data: {train: a}\noutput_dir: o\n", "model is missing"),
        ("no rows", "model: m\ndata: {}\noutput_dir: o\n", "data.train is missing"),
        ("null for data", "model: m\ndata:\noutput_dir: o\n", "data:", "None"),
        ("a path for data", "model: m\ndata: rows.jsonl\noutput_dir: o\n", "data:", "train"),
        ("a list for data", "model: m\ndata: [a]\noutput_dir: o\n", "data:", "train"),
        ("no for a model", "model: no\ndata: {train: a}\noutput_dir: o\n", "model:", "False"),
        ("a date for a folder", "model: m\ndata: {train: a}\noutput_dir: 2024-01-01\n", "date"),
        ("a time for a folder", "model: m\ndata: {train: a}\noutput_dir: 12:30\n", "750"),
        ("a NUL by escape", 'model: "a\\0b"\ndata: {train: a}\noutput_dir: o\n', "control"),
        ("a half pair", 'model: "\\uD800"\ndata: {train: a}\noutput_dir: o\n', "unicode"),
        ("a web page", "<!DOCTYPE html>\n<p>404: not found</p>\n", "recipe.yaml"),
        ("JSON lines", _lines(GOOD, GOOD), "not valid YAML"),
    ):

        def write(folder: Path, content: str | bytes = content) -> Path:
            data = content.encode() if isinstance(content, str) else content
            (folder / "recipe.yaml").write_bytes(data)
            return folder / "recipe.yaml"

        yield Case(f"a recipe of {name}", write, ("recipe.yaml", *words))

    def path(name: str, make: Callable[[Path], object], *words: str) -> Case:
        def write(folder: Path) -> Path:
            make(folder / "recipe.yaml")
            return folder / "recipe.yaml"

        return Case(f"a recipe that is {name}", write, ("recipe.yaml", *words))

    yield path("not there", lambda p: None, "does not exist")
    yield path("a folder", Path.mkdir, "is a folder")
    yield path("a pipe", os.mkfifo, "pipe or device")
    yield path("a device", lambda p: p.symlink_to("/dev/zero"), "pipe or device")
    yield path("a link to nowhere", lambda p: p.symlink_to("nowhere"), "broken symbolic link")
    yield path("a link to itself", lambda p: p.symlink_to(p), "broken symbolic link")


OVERRIDES = [
    ("model=5", "model:", "5"),
    ("model=[a, b]", "model:"),
    ("model={a: b}", "model:"),
    ("model=", "model:", "None"),
    ("model=''", "model:", "at least 1 character"),
    ("model.name=x", "'model' is a value"),
    ("output_dir=''", "output_dir:", "at least 1 character"),
    ("output_dir=true", "output_dir:"),
    ('output_dir="a\\nb"', "output_dir:", "control character"),
    ("dtype=fp32", "dtype:", "float32"),
    ("dtype=16", "dtype:"),
    ("compile=maybe", "compile:"),
    ("data=rows.jsonl", "data:"),
    ("data.tran=x", "data.tran", "'train'"),
    ("data.train=5", "data.train:", "path or a list of sources"),
    ("data.train=", "data.train:", "None"),
    ("data.train=true", "data.train:"),
    ("data.train=''", "data.train:", "at least 1 character"),
    ("data.train=[]", "data.train:", "at least 1 item"),
    ("data.train=[5]", "data.train[0]:", "5"),
    ("data.train=[a, null]", "data.train[1]:", "None"),
    ("data.train=[[a]]", "data.train[0]:"),
    ("data.train={path: a}", "data.train:"),
    ("data.train=[{}]", "data.train[0].path is missing"),
    ("data.train=[a, {weight: 2}]", "data.train[1].path is missing"),
    ("data.train=[{path: 5}]", "data.train[0].path:", "5"),
    ("data.train=[{path: a, wieght: 2}]", "data.train[0].wieght", "'weight'"),
    ("data.train=[{path: a, weight: x}]", "data.train[0].weight:", "'x'"),
    ("data.train=[{path: a, weight: 0}]", "data.train[0]", "above 0"),
    ("data.train=[{path: a, weight: -1}]", "data.train[0]", "-1"),
    ("data.train=[{path: a, weight: .nan}]", "data.train[0].weight:", "finite"),
    ("data.train=[{path: a, weight: .inf}]", "data.train[0].weight:", "finite"),
    ("data.train=[{path: a, weight: 1e9}]", "data.train[0]", "up to 1000"),
    ("data.train=[{path: a, weight: true}]", "data.train[0]: weight", "not true"),
    ("data.train=[{path: a, weight: null}]", "data.train[0].weight:", "None"),
    ("data.train=[{path: a, columns: [x]}]", "data.train[0].columns"),
    ("data.train=[{path: a, columns: {prompt: 5}}]", "data.train[0].columns"),
    ("data.train.0=x", "'train' is a value"),
    ("data.eval=1", "data.eval:", "less than 1"),
    ("data.eval=1.5", "data.eval:", "less than 1"),
    ("data.eval=-0.1", "data.eval:", "greater than or equal to 0"),
    ("data.eval=.nan", "data.eval:"),
    ("data.eval=.inf", "data.eval:"),
    ("data.eval=true", "data.eval:", "not true"),
    ("data.eval=false", "data.eval:", "not false"),
    ("data.eval=", "data.eval:", "None"),
    ("data.eval=[]", "data.eval:", "at least 1 item"),
    ("data.eval=[5]", "data.eval[0]:"),
    ("data.eval=[{path: a, weight: 2}]", "data.eval", "only data.train"),
    ("data.max_length=0", "data.max_length:", "0"),
    ("data.max_length=1", "data.max_length:", "1"),
    ("data.max_length=-5", "data.max_length:", "-5"),
    ("data.max_length=1.5", "data.max_length:", "1.5"),
    ("data.max_length=x", "data.max_length:", "'x'"),
    ("data.max_length=true", "data.max_length:", "not true"),
    ("data.max_length=.inf", "data.max_length:"),
    ("data.max_length=1e30", "data.max_length:"),
    ("data.max_length=[512]", "data.max_length:", "[512]"),
    ("data.limit=0", "data.limit:"),
    ("data.limit=-1", "data.limit:"),
    ("data.limit=true", "data.limit:", "not true"),
    ("data.columns=5", "data.columns:"),
    ("data.columns=[prompt]", "data.columns:"),
    ("data.columns={prompt: 5}", "data.columns:"),
    ("data.packing=maybe", "data.packing:"),
    ("data.padding_free=5", "data.padding_free:"),
    ("training=5", "training:"),
    ("training=[a]", "training:"),
    ("training.learning_rat=1", "training.learning_rat", "'learning_rate'"),
    ("training.learning_rate=0", "training.learning_rate:"),
    ("training.learning_rate=-1", "training.learning_rate:"),
    ("training.learning_rate=.nan", "training.learning_rate:"),
    ("training.learning_rate=.inf", "training.learning_rate:"),
    ("training.learning_rate=true", "training.learning_rate:", "not true"),
    ("training.learning_rate=fast", "training.learning_rate:", "'fast'"),
    ("training.learning_rate=[1]", "training.learning_rate:"),
    ("training.num_train_epochs=0", "training.num_train_epochs:"),
    ("training.num_train_epochs=-3", "training.num_train_epochs:"),
    ("training.num_train_epochs=1e300", "training.num_train_epochs:"),
    ("training.max_steps=0", "training.max_steps:", "at least 1"),
    ("training.max_steps=-5", "training.max_steps:"),
    ("training.max_steps=1.5", "training.max_steps:"),
    ("training.max_steps=99999999999999", "training.max_steps:"),
    ("training.per_device_train_batch_size=0", "per_device_train_batch_size:"),
    ("training.per_device_train_batch_size=x", "per_device_train_batch_size:"),
    ("training.gradient_accumulation_steps=0", "gradient_accumulation_steps:"),
    ("training.warmup_steps=-1", "training.warmup_steps:"),
    ("training.weight_decay=-1", "training.weight_decay:"),
    ("training.max_grad_norm=.nan", "training.max_grad_norm:"),
    ("training.eval_strategy=sometimes", "training.eval_strategy:"),
    ("training.save_strategy=5", "training.save_strategy:"),
    ("training.save_total_limit=0", "training.save_total_limit:"),
    ("training.report_to={a: b}", "training.report_to:"),
    ("training.seed=-1", "training.seed:"),
    ("training.seed=4294967296", "training.seed:"),
    ("training.seed=x", "training.seed:"),
    ("training.adam_beta1=x", "training.adam_beta1:", "'x'"),
    ("training.adam_beta1=.nan", "training.adam_beta1:"),
    ("training.adam_epsilon=true", "training.adam_epsilon:", "True"),
    ("training.neftune_noise_alpha=[1]", "training.neftune_noise_alpha:"),
    ("training.dataloader_num_workers=many", "training.dataloader_num_workers:"),
    ("training.gradient_checkpointing=often", "training.gradient_checkpointing:"),
    ("training.output_dir=x", "training.output_dir", "output_dir at the top"),
    ("training.bf16=true", "training.bf16", "dtype"),
    ("lora=5", "lora:"),
    ("lora=[q_proj]", "lora:"),
    ("lora.rank=4", "lora.rank", "use lora.r"),
    ("lora.r=0", "r must be"),
    ("lora.r=-8", "r must be"),
    ("lora.r=2.5", "r must be"),
    ("lora.r=eight", "r must be"),
    ("lora.r=true", "r must be"),
    ("lora.r=[8]", "r must be"),
    ("lora.r=", "r must be"),
    ("lora.r.x=8", "r must be"),
    ("lora.lora_alpha=.nan", "lora_alpha must be"),
    ("lora.lora_alpha=0", "lora_alpha must be"),
    ("lora.lora_alpha=x", "lora_alpha must be"),
    ("lora.lora_dropout=1", "lora_dropout must be"),
    ("lora.lora_dropout=-0.1", "lora_dropout must be"),
    ("lora.lora_dropout=x", "lora_dropout must be"),
    ("lora.target_modules=5", "target_modules must be"),
    ("lora.target_modules=[]", "target_modules is empty"),
    ("lora.target_modules=[5]", "target_modules"),
    ("lora.target_modules={a: b}", "target_modules"),
    ("lora.bias=some", "bias"),
    ("lora.use_dora=maybe", "use_dora"),
    ("lora.init_lora_weights=piza", "init_lora_weights"),
    ("lora.rank_pattern=5", "rank_pattern"),
    ("lora.rank_pattern={q_proj: x}", "r must be"),
    ("lora.alpha_pattern=[1]", "alpha_pattern"),
    ("lora.layers_to_transform=x", "layers_to_transform"),
    ("lora.modules_to_save=5", "modules_to_save"),
    ("lora.r=[1", "lora.r=[1", "not valid YAML"),
    ("lora.r=&a [*a]", "an alias inside itself"),
    ("lora.r=!!python/name:os.system ''", "not valid YAML"),
    ("lora.r=" + "[" * 600, "nested too deeply"),
    ("data.max_length=0x" + "f" * 5000, "data.max_length:", "bits"),
    ("data.max_length=" + "9" * 5000, "not valid YAML", "digits"),
    ("lora.r", "not an override"),
    ("=5", "not an override"),
    (".r=5", "is not a recipe key"),
    ("lora.=5", "is not a recipe key"),
    ("lora..r=5", "is not a recipe key"),
    ("=", "not an override"),
]


def _overrides() -> Iterator[Case]:
    for override, *words in OVERRIDES:
        yield Case(override[:60], lambda _, given=override: given, tuple(words))
