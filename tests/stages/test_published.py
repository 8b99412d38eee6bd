"""From stage to stage through a store in s3: recover publishes, a LoRA is trained on the address, with the same lineage as from folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.artifacts import store
from tests.servers import moto

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def args(tiny, tiny_data, tmp_path) -> list[str]:
    return [
        f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=[{tiny_data}/folder]",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8",
        f"data.read.cache={tmp_path}/cache", "data.read.workers=0", "steps=2", "batch=4", "optim.warmup=0", "probe.bins=2", "data.name=x",
    ]  # fmt: skip


def test_a_lora_is_trained_on_what_recover_published(args, tmp_path, run_stage, capfd):
    with moto() as bucket:
        store_url = f"s3://{bucket.name}/artifacts"
        recover = [*args, f"out={tmp_path}/recover", "save_dtype=float32", f"publish={store_url}"]
        assert run_stage("recover", *recover)[0] == 0
        assert run_stage("recover", *recover)[0] == 0  # it is finished, and published already
        recovered = json.loads((tmp_path / "recover/artifact.json").read_text())
        address = f"{store_url}/{recovered['id']}"
        assert store.read_record(address).files == recovered["files"]
        try:
            lora = ["arm=recovered@1", "adapter.rank=2"]
            code, stderr = run_stage("lora", *args, *lora, f"trained_on={address}", f"out={tmp_path}/far")
            assert code == 0, stderr
            assert run_stage("lora", *args, *lora, f"trained_on={tmp_path}/recover", f"out={tmp_path}/near")[0] == 0
        finally:
            shutil.rmtree(ROOT / store.CACHE / recovered["id"], ignore_errors=True)
    far, near = (json.loads((tmp_path / name / "artifact.json").read_text()) for name in ("far", "near"))
    assert far["inference"]["trained_on"] == {"path": address, "id": recovered["id"]}
    assert [parent["id"] for parent in far["parents"]] == [parent["id"] for parent in near["parents"]]
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("far", "near")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_wrong_store_is_told_before_the_run(args, tmp_path, run_stage):
    code, stderr = run_stage("recover", *args, f"out={tmp_path}/out", "publish=https://example.org/store")
    assert code == 2
    assert "is no place for artifacts" in stderr
    assert not (tmp_path / "out").exists()


def test_a_store_that_cannot_be_written_ends_with_its_code_and_leaves_the_artifact(args, tmp_path, run_stage):
    with moto() as bucket:
        code, stderr = run_stage("recover", *args, f"out={tmp_path}/out", f"publish=s3://{bucket.name}-nowhere/store")
    assert code == 2, stderr
    assert (tmp_path / "out/artifact.json").is_file()
