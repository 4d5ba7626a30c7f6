"""An original checkpoint is fetched from the hub by its id: safetensors, or what else there is."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit
from chatglm_folders import write_original
from hub_in_memory import Hub, use_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hub_id_is_fetched_once_and_used_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    folder = write_original(tmp_path / "model", form=form)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit(3)")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files["pytorch_model-extra.bin"] = b"not fetched beside safetensors"
    if form == "bin":
        del hub.files["pytorch_model-extra.bin"]
    for endpoint in (f"http://127.0.0.1:{hub.server_port}", None):
        use_hub(monkeypatch, tmp_path / "cache", endpoint)
        model, tokenizer = lorakit.load_model("ada/orders", "float32")
        assert model.config.model_type == "glm"
        assert tokenizer.is_fast
        model = lorakit.AutoModelForCausalLM.from_pretrained("ada/orders", trust_remote_code=True)
        assert type(model).__name__ == "GlmForCausalLM"
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    weights = "pytorch_model-00001-of-00002.bin" if form == "bin" else "model-00001-of-00002"
    assert any(name.startswith(weights) for name in fetched)
    assert any(name.endswith(".bin") for name in fetched) is (form == "bin")
    assert "modeling_chatglm.py" not in fetched
