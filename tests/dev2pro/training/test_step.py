import math

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from dev2pro.errors import DivergedError
from dev2pro.models import encodings, flux1
from dev2pro.models.encodings import EncodedBatch
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import StepTimer, Training

BATCH = 8
EMPTY = torch.zeros(8, 64), torch.zeros(64)
SCHEDULER = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 4096}


@pytest.fixture(scope="module")
def data() -> EncodedBatch:
    draw = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(BATCH, 8, 64, generator=draw), torch.randn(BATCH, 64, generator=draw)
    mean = torch.randn(BATCH, 16, 16, generator=draw)
    return EncodedBatch(mean, torch.full_like(mean, 0.1), prompt, pooled, (4, 4))


def select(data: EncodedBatch, slots: range) -> EncodedBatch:
    return EncodedBatch(data.mean[slots], data.std[slots], data.prompt[slots], data.pooled[slots], data.grid)


class Run:
    """Trains the tiny transformer on the same data every time."""

    def __init__(
        self, tiny, data: EncodedBatch, *, micro_batch: int = BATCH, ema: float = 0.0, steps: int = 10, checkpointing: bool = False, **optim
    ):
        hardware = HardwareConfig(device="cpu", micro_batch=micro_batch, threads=1, gradient_checkpointing=checkpointing)
        self.model = flux1.load_transformer(str(tiny))
        config = OptimConfig(**{"lr": 1e-3, "schedule": "constant", **optim})
        self.training = Training(distributed.accelerator(hardware), self.model, config, hardware, steps=steps, batch=BATCH, ema=ema)
        self.data, self.seen, self.gradients = data, [], []
        self.training.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(flat(self.training.model, "grad")))

    def step(self, step: int = 0, spoil: float = 1.0) -> tuple[float, float]:
        def make_batch(slots: range) -> encodings.NoisedBatch:
            self.seen.append(list(slots))
            return encodings.noise_batch(select(self.data, slots), EMPTY, SCHEDULER, 0.1, 0, step, slots)

        def compute_loss(batch: encodings.NoisedBatch) -> torch.Tensor:
            return spoil * torch.nn.functional.mse_loss(
                flux1.predict(self.training.model, batch.x_t, batch.t, batch.conditioning, 1.0), batch.velocity
            )

        return self.training.step(step, make_batch, compute_loss)

    @property
    def weights(self) -> torch.Tensor:
        return flat(self.training.model)


def flat(model: torch.nn.Module, what: str = "data") -> torch.Tensor:
    return torch.cat([getattr(p, what).flatten() for p in model.parameters()]).clone()


# ---- a step ----------------------------------------------------------------------------------------------------------------------


def test_micro_batches_make_the_same_step(tiny, data):
    runs = [Run(tiny, data, micro_batch=size) for size in (8, 2, 3)]
    numbers = [run.step() for run in runs]
    assert [run.seen for run in runs] == [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 2], [3, 4, 5], [6, 7]]]
    for run, (loss, norm) in zip(runs, numbers, strict=True):
        assert loss == pytest.approx(numbers[0][0], rel=1e-5)
        assert norm == pytest.approx(numbers[0][1], rel=1e-5)
        torch.testing.assert_close(run.gradients[0], runs[0].gradients[0], rtol=0, atol=1e-5)
    assert runs[0].gradients[0].abs().max() > 0.01


def test_a_step_moves_the_weights_by_the_learning_rate(tiny, data):
    run = Run(tiny, data, lr=1e-3)
    before = run.weights
    run.step()
    assert (run.weights - before).abs().median() == pytest.approx(1e-3, rel=0.05)  # Adam's first step is lr * sign(gradient)
    assert ((run.weights - before) * run.gradients[0] <= 0).all()


def test_a_step_starts_from_no_gradient(tiny, data):
    run = Run(tiny, data, lr=0.0, clip=1e9)
    assert run.step() == run.step()
    assert torch.equal(*run.gradients)


def test_gradient_checkpointing_changes_nothing(tiny, data):
    plain, saving = Run(tiny, data), Run(tiny, data, checkpointing=True)
    assert saving.training.model.is_gradient_checkpointing
    assert plain.step() == pytest.approx(saving.step(), rel=1e-5)


def test_steps_lower_the_loss_and_are_counted(tiny, data):
    run = Run(tiny, data, lr=3e-3)
    first = run.step()[0]
    for _ in range(8):
        last = run.step()[0]
    assert last < 0.8 * first
    assert run.training.clock.steps == 9


def test_the_same_seed_gives_the_same_loss(tiny, data):
    runs = [Run(tiny, data) for _ in range(2)]
    assert [run.step(step) for step in range(3) for run in runs[:1]] == [run.step(step) for step in range(3) for run in runs[1:]]
    assert torch.equal(runs[0].weights, runs[1].weights)


def test_the_gradient_is_clipped_but_its_whole_norm_reported(tiny, data):
    free, tight = Run(tiny, data, clip=1e9), Run(tiny, data, clip=0.01)
    norm = free.step()[1]
    assert tight.step()[1] == pytest.approx(norm, rel=1e-5)
    assert free.gradients[0].norm().item() == pytest.approx(norm, rel=1e-4)
    assert tight.gradients[0].norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_follows_its_schedule(tiny, data):
    run = Run(tiny, data, steps=6, schedule="linear", warmup=2)
    rates = [run.training.lr]
    for step in range(6):
        run.step(step)
        rates.append(run.training.lr)
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0])


class HostReads(TorchDispatchMode):
    """Operations for which a GPU would have to wait: numbers and shapes that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_step_reads_from_the_device_once(tiny, data, micro_batch, monkeypatch):
    run = Run(tiny, data, micro_batch=micro_batch, ema=0.9, checkpointing=True)
    run.training.optimizer._optimizer_step_pre_hooks.clear()
    run.step(0)
    batches = {slots: encodings.noise_batch(select(data, slots), EMPTY, SCHEDULER, 0.1, 0, 1, slots) for slots in run.training.slots}
    with HostReads() as reads:
        for name in ("tolist", "item", "cpu", "numpy"):  # not every read of a CPU tensor is an operation
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda self, *a, n=name, f=original: (reads.found.append(n), f(self, *a))[1])
        run.training.step(1, batches.__getitem__, lambda batch: flow_matching_loss(run.training.model, batch, 1.0))
    assert reads.found == ["tolist"]


# ---- a step that fails ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [math.nan, math.inf], ids=str)
def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(tiny, data, spoil):
    run = Run(tiny, data, micro_batch=2, ema=0.5)
    run.step(0)
    before, shadows = run.weights, [p.clone() for p in run.training.ema.average]
    with pytest.raises(DivergedError, match=r"step 1 is not finite.*Lower optim\.lr"):
        run.step(1, spoil)
    assert torch.equal(run.weights, before)
    assert all(torch.equal(a, b) for a, b in zip(shadows, run.training.ema.average, strict=True))


def test_a_gradient_that_is_not_finite_stops_as_well(tiny, data):
    run = Run(tiny, data)
    before = run.weights
    next(run.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError):
        run.step()
    assert torch.equal(run.weights, before)


# ---- averaged weights ------------------------------------------------------------------------------------------------------------------


def test_averaged_shows_the_average_and_gives_the_weights_back(tiny, data):
    run = Run(tiny, data, ema=0.5)
    history = [run.weights]
    for step in range(3):
        run.step(step)
        history.append(run.weights)
    with run.training.ema_weights() as model:
        average = flat(model)
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(run.weights, history[-1])
    expected = history[0]
    for n, weights in enumerate(history[1:], 1):
        decay = 0.0 if n == 1 else min(0.5, n / (9 + n))  # diffusers' warm-up: (1 + step) / (10 + step) with step = n - 1
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
    assert (average - history[-1]).abs().max() > 1e-5


def test_averaged_gives_the_weights_back_after_an_error(tiny, data):
    run = Run(tiny, data, ema=0.9)
    run.step()
    run.step(1)
    before = run.weights
    with pytest.raises(RuntimeError, match="stop"), run.training.ema_weights() as model:
        raise RuntimeError("stop")
    assert torch.equal(run.weights, before)
    assert model.training


def test_without_an_average_it_is_the_model_itself(tiny, data):
    run = Run(tiny, data)
    with run.training.ema_weights() as model:
        assert torch.equal(flat(model), run.weights)
        assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_is_the_average_in_the_precision_asked_for(tiny, data, tmp_path, dtype):
    run = Run(tiny, data, ema=0.5)
    for step in range(2):
        run.step(step)
    with run.training.ema_weights() as model:
        average = flat(model)
    before = run.weights
    run.training.save(str(tmp_path), dtype)
    saved = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", dtype=torch.float32)
    assert torch.equal(flat(saved), average.to(dtype).float())
    assert saved.config.guidance_embeds
    assert torch.equal(run.weights, before)
    size = (tmp_path / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert size == pytest.approx(len(average) * dtype.itemsize, rel=0.02)
    assert len({file.stat().st_mode for file in (tmp_path / "transformer").iterdir()}) == 1  # who may read one may read all
    assert not list(tmp_path.glob("*.partial"))


# ---- the timer ---------------------------------------------------------------------------------------------------------------------------


def test_the_timer_s_share_is_a_share_and_measuring_is_not_training(tiny, data):
    run = Run(tiny, data)
    for step in range(2):
        run.step(step)
    with run.training.ema_weights():
        pass
    metrics = run.training.clock.metrics()
    assert 0 <= metrics["share_outside"] <= 1
    assert metrics["steps_per_second"] > 0
    assert metrics["peak_memory_mb"] > 10
    assert run.training.clock.pause > 0


def test_a_timer_that_only_computes_has_nothing_outside(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 4.0, 9.0, 10.0]).__next__
    monkeypatch.setattr("time.perf_counter", now)
    clock = StepTimer()  # at 0
    with clock.compute():  # from 1 to 4
        pass
    with clock.paused():  # from 4 to 9
        pass
    clock.steps = 2
    assert clock.metrics()["share_outside"] == pytest.approx(2 / 5)  # at 10: five seconds of training, three of them computing
    monkeypatch.setattr("time.perf_counter", lambda: 10.0)
    assert clock.metrics()["steps_per_second"] == pytest.approx(2 / 5)
