from pathlib import Path

import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """48 short sums, of different lengths."""
    path = tmp_path / "rows.jsonl"
    lines = [
        f'{{"prompt": "{"what is " * (n % 4)}{n} + {n}?", "completion": "{2 * n}"}}'
        for n in range(48)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
