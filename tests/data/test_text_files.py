"""Plain text files are read as documents: a file, a line or a paragraph each."""

from pathlib import Path

import pytest

from lorakit.data.mixing import mix
from lorakit.data.text_files import looked_at
from lorakit.errors import InputError

KINDS = ("text", "document")
LONG = "The river is wide here and nobody remembers when it was narrow. " * 4
FORMS = {
    "line": f"{LONG}first\n{LONG}second\n{LONG}third\n",
    "paragraph": f"{LONG}a\n{LONG}b\n\n\n{LONG}c\n{LONG}d\n",
    "document": f"{LONG}\n\n{LONG}\n\n{LONG}",  # an article: a paragraph is one line
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_document_is_is_found_by_looking(form: str, tmp_path: Path):
    assert looked_at(FORMS[form]) == form
    assert looked_at(FORMS[form], ".md") == "document"
    path = tmp_path / "texts.txt"
    path.write_text(FORMS[form])
    found = mix(path, kinds=KINDS)
    expected = {
        "line": [(1, f"{LONG}first"), (2, f"{LONG}second"), (3, f"{LONG}third")],
        "paragraph": [(1, f"{LONG}a\n{LONG}b"), (5, f"{LONG}c\n{LONG}d")],
        "document": [(1, FORMS["document"])],
    }[form]
    assert [(s.where, s.text) for s in found.samples] == [
        (f"texts.txt:{line}", text) for line, text in expected
    ]
    assert any(f"{len(expected)} document" in notice for notice in found.notices)


def test_a_book_of_wrapped_lines_is_one_document():
    lines = "\n".join(["It was a bright cold day in April, and the clocks"] * 50)
    assert looked_at(f"{lines}\n\n{lines}\n\n{lines}\n") == "document"


@pytest.mark.parametrize(("how", "number"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_a_setting_chooses(how: str, number: int, tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("a\nb\n\nc\r\nd\r\n", newline="")
    found = mix(path, kinds=KINDS, sample_by=how)  # type: ignore[arg-type]
    assert len(found.samples) == number
    assert "\r" not in "".join(s.text or "" for s in found.samples)


def test_a_folder_of_texts_is_read_whatever_words_are_in_their_names(tmp_path: Path):
    for name in ("my_test_notes.txt", "guide.md", "dev-setup.md"):
        (tmp_path / name).write_text(f"about {name}")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = mix(tmp_path, kinds=KINDS)
    assert len(found.samples) == 3
    assert any("picture.png" in notice for notice in found.notices)


def test_files_that_are_named_for_a_part_are_that_part(tmp_path: Path):
    for name in ("train.txt", "validation.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    found = mix(tmp_path, kinds=KINDS)
    assert [s.text for s in found.samples] == ["train.txt"]
    assert [source.path for source in found.held_out] == [f"{tmp_path}:validation"]


def test_a_readme_beside_rows_is_no_row(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text("# Rows")
    assert [s.text for s in mix(tmp_path, kinds=KINDS).samples] == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "kinds", "words"),
    [
        ("rows.txt", '{"text": "a"}\n', KINDS, "first line is JSON.*jsonl"),
        ("rows.txt", "some text", ("conversation", "text"), "rows.txt:1.*objective: pretrain"),
        ("rows.md", " \n\n", KINDS, "holds no rows"),
        ("rows.txt", "\udcff", KINDS, "rows.txt:1: not UTF-8"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_named(
    name: str, content: str, kinds: tuple[str, ...], words: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=words):
        mix(tmp_path / name, kinds=kinds)
