"""Pictures where people see them: `lorakit check`, its contact sheet, a run's record and report."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command import run_lorakit
from lorakit.data.picture_figures import picture_figures
from lorakit.data.thumbnails import EDGE, MOST_CHARACTERS, is_thumbnail, pixel_size, thumbnail
from lorakit.errors import InputError
from lorakit.report.run_page import write_report
from lorakit.training.check import check
from lorakit.training.recipe import load_recipe
from tiny_pictures import save_pictures, save_tiny_idefics3

EVIL = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and rows in `rows.jsonl`, of which two in three have pictures."""
    folder = tmp_path_factory.mktemp("shown")
    save_tiny_idefics3(folder / "base")
    files = save_pictures(folder / "pictures", 2)
    turned = Image.new("RGB", (30, 10), (200, 200, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    turned.save(folder / "pictures" / "turned.jpg", exif=exif)
    rows: list[dict[str, Any]] = []
    for i, file in enumerate(files):
        name = f"pictures/{file.name}"
        rows += [
            {"question": f"{i}: which color? {EVIL}", "answer": file.name, "image": name},
            {
                "question": f"{i}: <image> or <image>?",
                "answer": "the first",
                "images": [name, "pictures/turned.jpg"],
            },
            {"question": f"say {i}", "answer": str(i)},
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_check_shows_pictures_tokens_and_sizes_and_draws_them(folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.html"
    given = ("check", "--model", folder / "base", "--data", folder / "rows.jsonl", "--no-forecast")
    drawn = ("--contact-sheet", sheet, "--contact-sheet-rows", "5", "--show", "0", "data.eval=0")
    done = run_lorakit(tmp_path, *given, *drawn)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if "10 × 30" in line]
    assert line.replace("│", " ").split()[:6] == ["train", "24", "9", "7", "7", "7"]
    assert "26 × 16" not in line  # nothing but the smallest, the median and the largest
    page = sheet.read_text()
    assert page.count("<article>") == 5
    assert "11 more rows have pictures" in page
    assert page.count('src="data:image/jpeg;base64,') == 7  # of 5 rows, two of which have two
    assert "<script>" not in page
    assert "img-src data:" in page
    assert "rows.jsonl:1 " in page
    assert "10 × 30, 7 tokens" in page  # turned as its EXIF data says
    before = sheet.read_bytes()
    again = run_lorakit(tmp_path, *given, *drawn)  # an earlier sheet is replaced
    assert (again.returncode, sheet.read_bytes()) == (0, before)


REFUSED = {
    "a file that is no sheet": ("notes.html", "rows.jsonl", "exists and is not a contact sheet"),
    "another kind of file": ("sheet.png", "rows.jsonl", "ends in .html"),
    "rows without pictures": ("sheet.html", "text.jsonl", "no row to learn from has a picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sheet_that_cannot_be_drawn_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    name, rows, reason = REFUSED[case]
    (tmp_path / "notes.html").write_text("mine")
    (folder / "text.jsonl").write_text('{"question": "a?", "answer": "b"}\n' * 3)
    done = run_lorakit(
        tmp_path,
        *("check", "--model", folder / "base", "--data", folder / rows, "--no-forecast"),
        *("data.eval=0", "--contact-sheet", tmp_path / name),
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["notes.html"]
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_figures_are_those_of_the_rows(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0.25},
        "output_dir": str(tmp_path / "none"),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    found = check(load_recipe(tmp_path / "recipe.json"), with_forecast=False)
    for name, rows in (("train", found.setup.data.train), ("eval", found.setup.data.eval)):
        figures = found.pictures[name]
        assert figures == picture_figures(rows)
        placed = [one for row in rows if row.pictures for one in row.pictures.placed]
        assert figures.pictures == len(placed)
        assert figures.files == len({one.source for one in placed})
        assert figures.rows == sum(bool(row.pictures and row.pictures.placed) for row in rows)
        assert figures.tokens == (7, 7, 7)
        assert figures.share == 7 * len(placed) / sum(map(len, rows))
        for size in figures.sizes:
            assert size in {pixel_size(one.source) for one in placed}


def test_a_thumbnail_is_small_and_only_a_small_picture_passes_for_one(tmp_path: Path) -> None:
    file = tmp_path / "noise.png"
    Image.effect_noise((900, 500), 90).save(file)
    url = thumbnail(str(file))
    assert is_thumbnail(url)
    assert max(pixel_size(url)) == EDGE
    assert len(url) < MOST_CHARACTERS
    others = ["https://a/b.png", url + '" onerror="x', "data:text/html;base64,AA"]
    others += ["data:image/svg+xml;base64,AAAA", "data:image/png;base64," + "A" * 10**6]
    for other in (None, 5, "x", *others):
        assert not is_thumbnail(other)
    file.write_bytes(b"no picture")
    with pytest.raises(InputError):
        thumbnail(str(file))
    with pytest.raises(InputError):
        pixel_size(str(file))


def test_a_report_shows_pictures_beside_answers(folder: Path, tmp_path: Path) -> None:
    data = thumbnail(str(folder / "pictures" / "red-0.png"))  # in the row itself
    rows = [{"question": f"{i}: which?", "answer": "red", "image": data} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(folder / "base"),
        "dtype": "float32",
        "data": {"train": "rows.jsonl", "eval": str(folder / "rows.jsonl")},
        "lora": {"r": 2},
        "training": {"max_steps": 1},
        "samples": 3,
        "output_dir": "run",
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = run_lorakit(tmp_path, "train", "recipe.json")
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    parts = [part for s in samples for m in s["prompt"] for part in m["content"]]
    pictures = [part for part in parts if isinstance(part, dict) and part["type"] == "image"]
    assert len(pictures) == 3
    assert all(is_thumbnail(part["thumbnail"]) for part in pictures)
    assert pictures[0]["image"].endswith("red-0.png")
    page = write_report(tmp_path / "run").path.read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert "which color?" in page
    # Records of others hold anything: a picture that is none is named, and nothing else happens.
    samples[0]["prompt"][0]["content"][0]["thumbnail"] = "https://example.org/spy.png"
    samples[1]["prompt"][0]["content"] = [{"type": "image", "image": EVIL}, 5]
    (tmp_path / "run" / "samples.json").write_text(json.dumps(samples))
    page = write_report(tmp_path / "run").path.read_text()
    assert "example.org" not in page
    assert "[picture red-0.png]" in page
    assert "<script>" not in page
