"""The package's face: names that resolve, and an import that loads nothing heavy."""

import subprocess
import sys

import lorakit


def test_importing_lorakit_imports_nothing_heavy():
    code = (
        "import sys, lorakit; "
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    for name in lorakit.__all__:
        assert getattr(lorakit, name) is not None
    assert set(dir(lorakit)) >= {
        "LoraConfig", "LoraModel", "get_peft_model", "PeftModel", "LoraLinear", "LoraMonitor",
        "recommended_config", "train", "merge", "load_model",
    }  # fmt: skip
    assert lorakit.PeftModel is lorakit.LoraModel
