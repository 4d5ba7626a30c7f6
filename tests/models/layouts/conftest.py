"""One checkpoint in ChatGLM3's original layout, which nothing writes into."""

from pathlib import Path

import pytest

from chatglm_folders import write_original


@pytest.fixture(scope="session")
def chatglm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original") / "chatglm3-6b")
