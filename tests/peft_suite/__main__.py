"""Runs PEFT's LoRA tests twice, on PEFT and on lorakit: `make peft-suite`.

The tests come from PEFT's source distribution of the installed version. What PEFT itself passes
here, without a network, lorakit has to pass too, but for `out_of_scope.txt`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_initialization",
    "test_lora_variants",
    "test_lorafa",
    "test_loraplus",
    "test_low_level_api",
    "test_other",
    "test_seq_classifier",
    "test_target_parameters",
    "test_token_classification_qa",
    "test_trainable_tokens",
    "test_tuners_utils",
)


def main() -> int:
    """Prints a table by file, and what lorakit fails; 1 when there is something."""
    arguments = argparse.ArgumentParser(prog="peft_suite", description=__doc__)
    arguments.add_argument("--cache", type=Path, default=Path(".cache/peft_suite"))
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("-k", default="", help="as pytest's -k")
    given = arguments.parse_args()
    cache = given.cache.resolve()
    source = fetch(cache)
    hub = cache / "huggingface" / "hub"
    if not hub.is_dir():
        python("-W", "ignore", "-m", "peft_suite.stand_ins", str(hub), check=True)
    results = {
        subject: run(subject, source, cache, given.processes, given.k)
        for subject in ("peft", "lorakit")
    }
    return report(results["peft"], results["lorakit"])


def fetch(cache: Path) -> Path:
    """The folder of PEFT's source, of the version that is installed."""
    name = f"peft-{version('peft')}"
    if not (cache / name).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        sdist = ("--no-deps", "--no-binary", ":all:", "--dest", str(cache))
        python("-m", "pip", "download", "--quiet", *sdist, name.replace("-", "=="), check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
        (cache / name / "tests" / "__init__.py").touch()  # its tests import each other
    return cache / name


def run(subject: str, source: Path, cache: Path, processes: int, k: str) -> dict[str, str]:
    """What became of each test, by its name: `passed`, `failed` or `skipped`."""
    written = cache / f"{subject}.xml"
    options = ["-c", os.devnull, f"--rootdir={source}", "-p", "no:cacheprovider", "-W", "ignore"]
    python(
        *("-m", "pytest", "-p", "peft_suite.plugin", *options, "-q", "--tb=short"),
        *("-n", str(processes), f"--junitxml={written}", "-k", k),
        *(f"tests/{name}.py" for name in FILES),
        cwd=source,
        stdout=(cache / f"{subject}.log").open("w"),
        PEFT_SUITE_SUBJECT=subject,
        HF_HOME=str(cache / "huggingface"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    return dict(outcomes(written))


def outcomes(written: Path):
    """Each test of a JUnit file and what became of it."""
    for case in ElementTree.parse(written).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        yield f"{case.get('classname')}::{case.get('name')}", outcome


def report(peft: dict[str, str], lorakit: dict[str, str]) -> int:
    """Prints how the two compare; 1 when lorakit fails what PEFT passes."""
    theirs = [name for name, outcome in peft.items() if outcome == "passed"]
    lost = [name for name in theirs if _outcome(name, lorakit) != "passed"]
    totals, failures = Counter(map(_file, theirs)), Counter(map(_file, lost))
    for file, total in sorted(totals.items()):
        print(f"{file:34} {total:5} passed by PEFT, {total - failures[file]:5} by lorakit")
    print(f"{'all':34} {len(theirs):5} passed by PEFT, {len(theirs) - len(lost):5} by lorakit")
    for name in lost:
        print(f"lorakit: {_outcome(name, lorakit)}: {name}")
    return 1 if lost or not theirs else 0


def _outcome(name: str, results: dict[str, str]) -> str:
    """What became of a test; where a class of PEFT's in its name is lorakit's, of all its cases."""
    if name in results:
        return results[name]
    function = name.partition("[")[0]
    cases = {outcome for other, outcome in results.items() if other.startswith(f"{function}[")}
    return "passed" if cases == {"passed"} else "not run"


def _file(name: str) -> str:
    return name.split(".")[1].partition("::")[0]


def python(*arguments: str, check: bool = False, cwd: Path | None = None, stdout=None, **env: str):
    """Runs this Python, with the tests' folder and the working folder on its path."""
    paths = os.pathsep.join([str(HERE.parent), str(cwd or HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, **env}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, stdout=stdout, check=check)


if __name__ == "__main__":
    sys.exit(main())
