"""A model folder to be damaged, and a guard against reading its weights."""

import shutil
from pathlib import Path

import pytest

from dev2pro.models import flux1


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's values fails; headers may be read."""
    from dev2pro.models import weight_headers

    class HeaderOnly:
        def __init__(self, file: Path, framework: str) -> None:
            self.file = opened(file, framework=framework)

        def __enter__(self) -> "HeaderOnly":
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            assert name in ("keys", "metadata", "get_slice"), f"{name} reads weights"
            return getattr(self.inner, name)

    opened = weight_headers.safe_open
    monkeypatch.setattr(weight_headers, "safe_open", HeaderOnly)
    for name in ("AutoencoderKL", "FluxPipeline", "FluxTransformer2DModel"):
        monkeypatch.setattr(getattr(flux1, name), "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
