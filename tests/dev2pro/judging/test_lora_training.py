import json
import shutil
from pathlib import Path

import pytest

from dev2pro.artifacts import record
from dev2pro.judging import lora_training
from dev2pro.judging.lora_training import TrainedModel, Training
from dev2pro.models import lora
from dev2pro.models.flux1 import ModelConfig
from tests.records import Config

BUNDLE = Path(__file__).parents[3] / "data" / "miniature"
BASE = ModelConfig(path=str(BUNDLE / "pipeline"), usual_guidance=3.5, max_sequence_length=8)
TEACHER = str(BUNDLE / "teacher")


@pytest.fixture
def recorded(tmp_path):
    """A LoRA's folder with its record; reads how it was trained."""

    def read(trained_on: str, guidance: float | list[float] = 1.0, id: str = "", adapter: str = "", file: str = "") -> Training:
        config, parents = Config(str(tmp_path / "lora")), {"training_adapter": adapter} if adapter else {}
        (tmp_path / "lora").mkdir(exist_ok=True)
        contract = {"trained_on": {"path": trained_on, "id": id or record.fingerprint(trained_on)}, "training_guidance": guidance}
        record.write(config.out, "lora", "lora", config, parents, step=1, metrics={}, inference=contract)
        return lora_training.read(str(tmp_path / "lora" / file), BASE)

    return read


@pytest.mark.parametrize("file", ["", lora.WEIGHTS])
def test_the_record_says_model_and_guidance(recorded, file):
    assert recorded(TEACHER, 1.0, file=file) == Training(TrainedModel(TEACHER), 1.0)


def test_a_range_of_guidances_is_measured_at_the_usual_one(recorded):
    assert recorded(TEACHER, [2.0, 6.0]).guidance == 3.5


def test_the_base_is_known_by_its_contents(recorded, tmp_path):
    shutil.copytree(BUNDLE / "pipeline", tmp_path / "copy")
    assert recorded(str(tmp_path / "copy")).model == TrainedModel(BASE.path)


def test_what_is_gone_changed_or_of_another_shape_is_told(recorded, tmp_path):
    assert "nowhere, which it was trained on, is not here" in recorded(str(tmp_path / "nowhere"), id="0" * 64).missing
    assert "or is another one now" in recorded(TEACHER, id="0" * 64).missing
    shutil.copytree(TEACHER, tmp_path / "deeper")
    file = tmp_path / "deeper/transformer/config.json"
    file.write_text(json.dumps({**(shape := json.loads(file.read_text())), "num_layers": shape["num_layers"] + 1}))
    assert "cannot be loaded (trained_on=" in (missing := recorded(str(tmp_path / "deeper")).missing)
    assert "another shape than the base" in missing
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/config.json").write_text("{}")
    assert "is no readable LoRA" in recorded(BASE.path, adapter=str(tmp_path / "adapter")).missing
    assert not recorded(TEACHER).missing


def test_without_a_record_nothing_is_known(tmp_path):
    found = lora_training.read(str(tmp_path / "a.safetensors"), BASE)
    assert found == Training(TrainedModel(""), 3.5, "no record beside it says what it was trained on")


def test_a_model_is_told_with_all_that_was_done_to_it():
    assert str(TrainedModel("a")) == "a"
    assert str(TrainedModel("a", "b", True)) == "a with the training adapter b without its guidance input"
