"""The page has what the folder has, says what it lacks, and makes no markup of a run's text."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from folders import TEMPLATE_SHA256, save_factors, save_run, save_samples

from command import run_lorakit
from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.report.run_page import Report, write_report

EVIL = """a_b</script></style><script>alert(1)</script><img src=x onerror='alert("2")'>&amp;"""


class Page(HTMLParser):
    """The elements of a page, its text, and the text of its figures and tables."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.html = report.path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for tag, attributes in self.tags if "id" in attributes}

    def headings(self) -> list[str]:
        return re.findall(r"<h3>(.*?)</h3>", self.html)


def test_a_whole_run_is_all_there(tmp_path: Path):
    report = write_report(save_run(tmp_path / "orders"))
    assert report.path == tmp_path / "orders" / "report.html"
    assert report.notices == []
    page = Page(report)
    assert page.ids() == {
        "curves", "data", "change", "map-change", "map-rank", "samples", "settings",
    }  # fmt: skip
    for words in (
        "The held-out loss fell from 2.73 to 0.412, by 85 %.",
        "64.2 k", "18.9 k of them learned", "1 min 23 s", "1.87 GB",
        "6,300 (29.4 %)", "cut at 256",
        "Most modules use about 7.5 of 8 directions: a larger r may help.",
        "Sure! Two mugs.", "equals the reference",
        "max_length: 256", "2.13.0", "0f" * 32, TEMPLATE_SHA256, "cd" * 32,
        "6,300 learned tokens a row",
        "3 of 180 rows are longer than data.max_length and were cut",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Size of the change, ‖ΔW‖ / ‖W‖, in %" in page.headings()
    assert [tag for tag, _ in page.tags].count("svg") == 7
    values = re.findall(r'<td class="h\d" title="[^"]*">([^<]*)<', page.html)
    assert len(values) == 2 * 14


def test_nothing_on_the_page_can_load_or_run(tmp_path: Path):
    page = Page(write_report(save_run(tmp_path / "run")))
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    ]
    assert not {"script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", page.html)


def test_text_of_the_run_never_becomes_markup(tmp_path: Path):
    folder = save_run(
        tmp_path / "run",
        base_model=EVIL,
        notices=[EVIL],
        warnings=[{"step": 1, "warning": EVIL, "message": EVIL, "cure": EVIL}],
        advice=[{"key": EVIL, "value": EVIL, "why": EVIL}],
        recipe={"model": EVIL, EVIL: {EVIL: EVIL}},
        versions={EVIL: EVIL},
        data=[{"path": EVIL, EVIL: EVIL}],
        template_sha256=EVIL,
        base_fingerprint=EVIL,
        data_statistics={EVIL: {"rows": 1, "tokens": 1, "supervised": 1, "lengths": {EVIL: 1}}},
    )
    plain = Page(write_report(save_run(tmp_path / "plain")))
    save_samples(folder, [(EVIL, EVIL, EVIL, EVIL)])
    evil_modules = {"modules": [f"l.{i}.{EVIL}" for i in range(2)], "weight_norm": [1.0, 1.0]}
    row = {"step": 1, "gradient_norm": [1, 1], "update_norm": [1, 1]}
    (folder / "monitor.jsonl").write_text(f"{json.dumps(evil_modules)}\n{json.dumps(row)}\n")
    page = Page(write_report(folder))
    assert page.text.count("<script>alert(1)</script>") >= 14
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"b", "wbr"}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_an_adapter_alone_has_a_page_that_says_what_is_missing(tmp_path: Path):
    config = LoraConfig(r=8, target_modules=["q_proj"], base_model_name_or_path="some/model")
    save_factors(tmp_path / "theirs", config)
    report = write_report(tmp_path / "theirs")
    page = Page(report)
    assert page.ids() == {"change", "map-change", "map-rank", "settings", "missing"}
    assert "on some/model" in page.text
    assert "Size of the change, ‖ΔW‖" in page.headings()
    assert "target_modules: - q_proj" in page.text
    for name in ("lorakit.json", "metrics.jsonl", "monitor.jsonl", "samples.json"):
        assert any(name in notice for notice in report.notices)
        assert name in page.text


@pytest.mark.parametrize(("samples", "told"), [(0, 0), (5, 1)])
def test_samples_are_missed_only_where_the_recipe_asked_for_them(
    tmp_path: Path, samples: int, told: int
):
    folder = save_run(tmp_path / "run", recipe={"samples": samples})
    (folder / "samples.json").unlink()
    assert len(write_report(folder).notices) == told


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path):
    folder = save_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": NaN, "grad_norm": 1.0}\n')
        file.write('{"loss": 1.0}\n[1]\n\n{"step": 22, "lo')
    with (folder / "monitor.jsonl").open("a") as file:
        file.write('{"step": 3, "gradient_norm": [1], "update_norm": [1]}\n')
    (folder / "samples.json").write_text("[{]")
    report = write_report(folder)
    assert report.notices == [
        "metrics.jsonl: 3 of 28 lines are damaged and left out.",
        "metrics.jsonl: 1 values are NaN or Inf: left out.",
        "monitor.jsonl: 1 of 11 lines are damaged and left out.",
        "samples.json is damaged and left out.",
    ]
    assert report.notices[0] in Page(report).text


def test_a_run_that_ended_in_no_numbers_still_has_a_page(tmp_path: Path):
    broken = {"eval_loss": float("nan"), "base_eval_loss": float("inf")}
    folder = save_run(tmp_path / "run", **broken)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            f'{{"step": 21, "loss": 1e300, "grad_norm": {10**400}, "eval_loss": Infinity}}\n'
        )
    head = {"modules": ["a\ud800"], "weight_norm": [1e300]}
    row = {"step": 10**400, "gradient_norm": [1], "update_norm": [1]}
    rows = [head, row, row | {"step": 1, "update_norm": [1e300]}, row | {"step": 2}]
    (folder / "monitor.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = write_report(folder)
    assert "it is NaN or Inf, so the adapter is of no use" in Page(report).text
    assert report.notices == [
        "metrics.jsonl: 3 values are NaN or Inf: left out.",
        "monitor.jsonl: 2 of 3 lines are damaged and left out.",
    ]


@pytest.mark.parametrize(
    "head", ["", "null", "{", '{"modules": ["a"], "weight_norm": []}', '{"modules": 3}', "[]"]
)
def test_a_monitor_file_that_names_no_modules_is_left_out(tmp_path: Path, head: str):
    folder = save_run(tmp_path / "run")
    (folder / "monitor.jsonl").write_text(f"{head}\n" + '{"step": 1}\n')
    report = write_report(folder)
    assert any("monitor.jsonl" in notice for notice in report.notices)
    assert "Size of the change, ‖ΔW‖" in Page(report).headings()


def test_extra_keys_of_an_unknown_form_are_left_out_and_said(tmp_path: Path):
    extra = {"warnings": [{"a": 1}], "data_statistics": {"train": {}}, "advice": [{"key": 1}]}
    report = write_report(save_run(tmp_path / "run", **extra))
    assert [notice.split(":")[1].split()[0] for notice in report.notices] == [
        "data_statistics",
        "warnings",
        "advice",
    ]


def test_a_long_answer_is_cut_and_the_rest_counted(tmp_path: Path):
    folder = save_run(tmp_path / "run")
    save_samples(folder, [("p", "r", "x" * 10_000, "y")] * 25)
    page = Page(write_report(folder))
    assert "… (7,000 more characters)" in page.text
    assert "5 more are in samples.json" in page.text


def test_five_hundred_steps_of_a_model_of_thirty_layers_stay_under_300_kb(tmp_path: Path):
    report = write_report(save_run(tmp_path / "run", layers=30, steps=500))
    assert report.path.stat().st_size < 300_000


def test_only_an_earlier_report_is_overwritten(tmp_path: Path):
    folder = save_run(tmp_path / "run")
    page = tmp_path / "page.html"
    assert write_report(folder, page).path == page
    write_report(folder, page)
    page.write_text("<html>mine</html>")
    with pytest.raises(InputError, match=r"page.html exists and is not a report"):
        write_report(folder, page)
    assert page.read_text() == "<html>mine</html>"
    with pytest.raises(InputError, match="is a folder: name a file"):
        write_report(folder, tmp_path)
    with pytest.raises(InputError, match=r"page.html is a file, not a folder"):
        write_report(folder, page / "report.html")
    assert write_report(folder, tmp_path / "new" / "a.html").path.is_file()


def refused(result: "subprocess.CompletedProcess[str]", words: str) -> None:
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_the_command_writes_the_page_and_refuses_what_is_no_adapter(tmp_path: Path):
    save_run(tmp_path / "run")
    done = run_lorakit(tmp_path, "report", "run", "-o", "page.html")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "report: page.html\n")
    (tmp_path / "empty").mkdir()
    refused(run_lorakit(tmp_path, "report", "empty"), "empty holds no adapter")
    (tmp_path / "run" / "lorakit.json").write_text("{")
    refused(run_lorakit(tmp_path, "report", "run"), "lorakit.json is damaged")
