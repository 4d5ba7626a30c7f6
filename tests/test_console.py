"""Nothing that a file, a model or a request brings acts on the terminal that shows it."""

import ast
import json
import unicodedata
from pathlib import Path

import pytest

import lorakit
from lorakit.console import open_console, say, say_json, visible
from lorakit.errors import InputError

HOSTILE = "a\x1b[2J\x1b]0;title\x07\x9b31m\x7f\r\u202eb\u2066c\u200f[red][link=file:///x]:skull:"


def acts(text: str) -> list[str]:
    """The characters that are controls, or change the writing direction."""
    return [
        c
        for c in text
        if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in BIDI)
    ]


BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_every_character_that_acts_is_shown_and_no_other_is_changed():
    everything = "".join(map(chr, range(0x11000)))
    assert acts(visible(everything)) == []
    ordinary = "été 中文\u3000\u00a0 עברית 👩\u200d💻 [red] \\ %s \t\n"
    assert visible(ordinary) == ordinary


def test_a_line_stays_one_line_and_json_keeps_its_meaning(capsys: pytest.CaptureFixture[str]):
    say(f"{HOSTILE}\nforged: line")
    assert capsys.readouterr().out.count("\n") == 1
    say_json({HOSTILE: [f"{HOSTILE}\n"]})
    printed = capsys.readouterr().out
    assert acts(printed) == []
    assert json.loads(printed) == {HOSTILE: [f"{HOSTILE}\n"]}


def test_tables_show_texts_and_read_no_markup(capsys: pytest.CaptureFixture[str]):
    from rich.table import Table

    from lorakit.cli.tables import print_table

    print_table(HOSTILE, ("name", HOSTILE), [(HOSTILE, "1")])
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    console = open_console()
    console.width = 400
    console.print(table)
    console.print(HOSTILE)
    printed = capsys.readouterr().out
    assert acts(printed) == []
    assert "".join(printed.split()).count("[red]") == 6  # a title, two headings, two cells, a line


def test_inspect_prints_no_sequence_out_of_an_adapters_files(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from lorakit.cli.inspect import inspect

    model, _ = lorakit.load_model(tiny_model)
    config = lorakit.LoraConfig(r=2, target_modules=["q_proj"])
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    values |= {"base_model_name_or_path": f"{HOSTILE}\nforged: x", "peft_version": HOSTILE}
    file.write_text(json.dumps(values))
    for as_json in (False, True):
        inspect(tmp_path, as_json=as_json)
        printed = capsys.readouterr().out
        assert acts(printed) == []
        assert "\nforged" not in printed
    with pytest.raises(InputError) as error:
        inspect(tmp_path, base=HOSTILE)
    assert acts(str(error.value)) == []


def test_everything_is_printed_by_the_console_module():
    package = Path(lorakit.__file__).parent
    elsewhere = []
    for path in package.rglob("*.py"):
        for node in ast.walk(_imported(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                # these print our own words and numbers alone, or JSON for another process
                own = path.name in (
                    "console.py",
                    "main.py",
                    "grammar_worker.py",
                ) or "params" in ast.unparse(node)
                if not own and name in ("print", "typer.echo", "Console", "sys.stdout.write"):
                    elsewhere.append(f"{path.relative_to(package)}:{node.lineno}")
    assert elsewhere == []


def _imported(text: str) -> ast.Module:
    """A module without what runs only where it is the program, as those do that write docs."""
    tree = ast.parse(text)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")
    ]
    return tree
