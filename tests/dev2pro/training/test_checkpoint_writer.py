"""Files are those of torch's own writer, hashed without being read again, and no byte of the state is held twice while they are written."""

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from dev2pro.training import checkpoint_writer
from dev2pro.training.checkpoint_writer import Staging, StreamingWriter, share, size
from tests import launch

ROOT = Path(__file__).resolve().parents[3]
_opened: list[tuple[str, int]] | None = None  # while a list: every file that this process opens, and the flags


def note(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None:
        _opened.append((str(arguments[0]), arguments[2]))


@pytest.fixture
def opened(monkeypatch) -> list[tuple[str, int]]:
    if not hasattr(sys, "_dev2pro_notes_opens"):  # a hook cannot be removed
        sys.addaudithook(note)
        sys._dev2pro_notes_opens = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules[__name__], "_opened", [])
    assert _opened is not None
    return _opened


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "model/weight": torch.randn(300, 40), "model/ünusual \"name\"": torch.randn(7), "ema/weight": torch.randn(300, 40).bfloat16(),
        "optimizer/exp_avg.codes/weight": torch.randint(0, 255, (300, 41), dtype=torch.uint8), "optimizer/step/weight": torch.tensor(3.0),
        "empty": torch.zeros(0, 5), "odd": torch.arange(3, dtype=torch.int8), "long": torch.arange(9),
    }  # fmt: skip


def save(writer: HuggingFaceStorageWriter, tensors: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(value) for name, value in state().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def content(folder: Path) -> dict[str, tuple]:
    """What a safetensors reader finds: every tensor with its type, shape and sharding."""
    found: dict[str, tuple] = {}
    for file in folder.iterdir():
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            sharding = json.loads(metadata.pop("DCP_SHARDING_INFO"))
            for key in opened.keys():  # noqa: SIM118  (safe_open is no dict)
                value = opened.get_tensor(key)
                found[key] = (value.dtype, tuple(value.shape), value.view(-1).view(torch.uint8).tolist(), sharding[key], metadata)
    return found


@pytest.mark.parametrize(("limit", "files"), [(checkpoint_writer.FILE, 1), (20_000, 5), (1, 8)])
def test_the_files_are_those_of_torch_s_own_writer(tmp_path, monkeypatch, limit, files):
    monkeypatch.setattr(checkpoint_writer, "FILE", limit)
    (tmp_path / "ours").mkdir()
    save(HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True), state())
    writer = StreamingWriter(tmp_path / "ours")
    save(writer, state())
    assert content(tmp_path / "ours") == content(tmp_path / "torch")
    assert same(load(tmp_path / "ours"), state())
    assert sorted(writer.files) == sorted(file.name for file in (tmp_path / "ours").iterdir())
    assert len(writer.files) == files


def test_what_is_written_is_hashed_and_not_read_again(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(checkpoint_writer, "CHUNK", 1000)
    writer = StreamingWriter(tmp_path)
    save(writer, state())
    ours = [(name, flags) for name, flags in opened if name.startswith(str(tmp_path))]
    assert ours, "the hook saw the file being written"
    assert all(flags & 3 == 1 for _, flags in ours), f"only O_WRONLY: {ours}"
    (name, entry), *_ = writer.files.items()
    written = (tmp_path / name).read_bytes()
    assert entry == [len(written), hashlib.sha256(written).hexdigest()]
    assert [flags & 3 for path, flags in opened if path == str(tmp_path / name)][-1] == 0, "and sees what reads"


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(tmp_path, monkeypatch):
    write = checkpoint_writer.os.write
    monkeypatch.setattr(checkpoint_writer.os, "write", lambda handle, chunk: write(handle, chunk[:777]))
    save(StreamingWriter(tmp_path), state())
    monkeypatch.undo()
    assert same(load(tmp_path), state())


def test_copies_are_of_their_moment_and_their_memory_is_used_again():
    tensors, staging = state(), Staging()
    first = staging.copy(tensors)
    assert same(first, tensors)
    where = {name: value.data_ptr() for name, value in first.items()}
    tensors["model/weight"] += 1
    assert same(first, state())
    second = staging.copy(tensors)
    assert same(second, tensors)
    assert {name: value.data_ptr() for name, value in second.items()} == where
    assert same(staging.copy({"larger": torch.ones(10**6)}), {"larger": torch.ones(10**6)})
    staging.release()
    assert same(staging.copy(tensors), tensors)


@pytest.mark.gpu
def test_copies_of_a_gpu_s_tensors_are_pinned():
    staging = Staging()
    copies = staging.copy({name: value.cuda() for name, value in state().items()})
    assert same(copies, state())
    assert copies["model/weight"].is_pinned()
    staging.release()


def test_ranks_share_the_work_evenly_and_each_tensor_is_somebody_s():
    tensors = {f"{i}": torch.empty(1000 + 37 * i) for i in range(40)}
    shares = [share(tensors, rank, 4) for rank in range(4)]
    assert sorted(name for mine in shares for name in mine) == sorted(tensors)
    loads = [sum(map(size, mine.values())) for mine in shares]
    assert max(loads) - min(loads) <= 1.05 * 4 * (1000 + 37 * 40)
    assert share(tensors, 0, 1).keys() == tensors.keys()


RANKS = """
import json, os, sys, torch, torch.distributed as dist, warnings
from pathlib import Path
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from dev2pro.training import checkpoint_writer
warnings.simplefilter("ignore")
folder, direction = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
torch.manual_seed(5)
whole = {"uneven": torch.randn(5, 3), "fewer": torch.randn(1, 4), "even": torch.randn(8, 2)}
plain = {"plain": torch.randn(1000), "other": torch.randn(999)}
sharded = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}
if direction == "write":
    tensors = sharded | plain
    mine = checkpoint_writer.share(tensors, rank, ranks)
    copies = checkpoint_writer.Staging().copy(mine)
    assert all(isinstance(copies[name], DTensor) for name in whole)
    assert len([name for name in plain if name in copies]) == (1 if ranks == 2 else len(plain)), copies.keys()
    for value in tensors.values():
        (value.to_local() if isinstance(value, DTensor) else value).zero_()  # as training goes on
    writer = checkpoint_writer.StreamingWriter(folder)
    dcp.save(copies, storage_writer=writer)
    assert writer.files and all(name.startswith(f"shard-{rank + 1:05d}-") for name in writer.files), writer.files
else:
    tensors = {name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]) for name, value in whole.items()} | {
        name: torch.zeros_like(value) for name, value in plain.items()
    }
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    assert all(torch.equal(tensors[name].full_tensor(), value) for name, value in whole.items())
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
dist.barrier()  # as in a stage, the processes end with their group
"""


def on_ranks(ranks: int, folder: Path, direction: str) -> None:
    (folder.parent / "work.py").write_text(RANKS)
    launch.on_ranks([f"{folder.parent}/work.py", str(folder), direction], ranks)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (1, 2)])
def test_sharded_tensors_go_from_so_many_ranks_to_so_many(tmp_path, before, after):
    folder = tmp_path / "saved"
    folder.mkdir()
    on_ranks(before, folder, "write")
    on_ranks(after, folder, "read")


STATE = """
import os, sys, time, torch
import stages
from diffusers import FluxTransformer2DModel
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from dev2pro.training import checkpoint, checkpoint_files, distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training
def held(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) * 1024
def peak(work):
    "Bytes of memory, over what is held before it."
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = held("VmRSS")
    work()
    return held("VmHWM") - before
def training(layers):
    config = FluxTransformer2DModel.load_config("data/miniature/pipeline", subfolder="transformer")
    config |= {"num_layers": layers, "num_single_layers": 2 * layers, "num_attention_heads": 8, "attention_head_dim": 64}
    hardware = HardwareConfig(device="cpu", threads=1)
    model = FluxTransformer2DModel.from_config({**config, "axes_dims_rope": (16, 24, 24)})
    made = Training(distributed.accelerator(hardware), model, OptimConfig(lr=1e-5), hardware, steps=100, batch=1, ema=0.99)
    get_optimizer_state_dict(made.model, made.optimizer)  # allocates the moments
    return made, sum(value.numel() * value.element_size() for value in checkpoint._tensors(made).values())
"""
MEMORY = """
run, size = training(2)
checkpoints = checkpoint.Checkpoints(sys.argv[1], run, checkpoint.CheckpointConfig(every=1, keep=1), 100, {})
def one(step):
    checkpoints.on_step_end(step, [])
    checkpoints.wait()
first, second = peak(lambda: one(1)), peak(lambda: one(2))
with checkpoints:
    pass
released = held("VmRSS")
print(size, first, second, checkpoint_files.list_checkpoints(checkpoints.out).keys() == {2}, peak(checkpoints.restore))
"""


def test_a_checkpoint_needs_the_state_once_and_loading_it_nothing(tmp_path):
    """In host memory, over the state itself: the copy, of which the next one makes use again. torch's own writer needed two copies and more."""
    files = "from dev2pro.training import checkpoint_writer\ncheckpoint_writer.FILE = 1 << 26\n"  # one is mapped at a time while it is read
    done = subprocess.run(
        [sys.executable, "-c", STATE + files + MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    state, first, second, whole, loaded = done.stdout.splitlines()[-1].split()
    assert int(state) > 0.5e9
    assert whole == "True"
    assert int(first) <= 1.1 * int(state)
    assert int(second) <= 0.1 * int(state)
    assert int(loaded) <= 0.1 * int(state) + (1 << 26)
