from pathlib import Path

import pytest


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, str]:
    """A model folder, a picture folder and a hub id."""
    for name in ("model/transformer", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model/transformer/config.json").write_text("{}")
    (tmp_path / "pictures/a.txt").write_text("a cat")
    return {"base": str(tmp_path / "model"), "data": str(tmp_path / "pictures"), "judge": "openai/clip"}
