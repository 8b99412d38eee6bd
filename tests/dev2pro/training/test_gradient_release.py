"""The step inside the backward pass: the same updates, and one gradient at a time."""

import pytest
import torch

from dev2pro.errors import DivergedError
from dev2pro.models import flux1
from dev2pro.training import distributed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training


class Run:
    def __init__(self, tiny, *, release: bool, clip: float = 1e9, lr: float = 1e-3, dtype: torch.dtype = torch.float32) -> None:
        hardware = HardwareConfig(device="cpu", threads=1, step_in_backward=release, gradient_checkpointing=True)
        model = flux1.load_transformer(str(tiny), dtype)
        config = OptimConfig(lr=lr, schedule="linear", warmup=2, clip=clip)
        self.training = Training(distributed.accelerator(hardware), model, config, hardware, steps=9, batch=2, ema=0.5)
        self.held = 0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self._count())  # after the one that updates

    def _count(self) -> None:
        self.held = max(self.held, sum(p.grad is not None for p in self.training.parameters))

    def step(self, step: int, spoil: float = 1.0) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(step)
        x, prompt, pooled = (torch.randn(2, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
        conditioning = flux1.build_conditioning(prompt, pooled, (4, 4))

        def compute_loss(_: range) -> torch.Tensor:
            return spoil * flux1.predict(self.training.model, x, torch.tensor([0.3, 0.7]), conditioning, 1.0).float().square().mean()

        return self.training.step(step, lambda slots: slots, compute_loss)

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.training.parameters])


def test_it_makes_the_same_steps_and_holds_no_gradient(tiny):
    usual, released = Run(tiny, release=False), Run(tiny, release=True)
    for step in range(3):
        loss, norm = released.step(step)
        assert (loss, pytest.approx(norm, rel=1e-5)) == usual.step(step)
        assert released.training.lr == usual.training.lr
    assert torch.equal(released.weights, usual.weights)
    assert all(torch.equal(a, b) for a, b in zip(released.training.ema.average, usual.training.ema.average, strict=True))
    assert (released.held, usual.held) == (0, len(usual.training.parameters))


def test_each_gradient_is_clipped_by_itself_and_the_whole_norm_reported(tiny):
    free, tight, seen = Run(tiny, release=True), Run(tiny, release=True, clip=0.01), []
    tight.training.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.norm().item() for p in tight.training.parameters if p.grad is not None)
    )
    norm = free.step(0)[1]
    assert tight.step(0)[1] == pytest.approx(norm, rel=1e-5)
    assert len(seen) == len(tight.training.parameters)
    assert max(seen) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops(tiny):
    run = Run(tiny, release=True)
    run.step(0)
    with pytest.raises(DivergedError, match="step 1 is not finite"):
        run.step(1, spoil=float("nan"))


def test_with_8_bit_moments_over_bfloat16_weights(tiny):
    with torch.compiler.set_stance("force_eager"):  # compiling it takes a minute
        usual, released = (Run(tiny, release=release, lr=1e-2, dtype=torch.bfloat16) for release in (False, True))
        assert type(released.training.optimizer).__name__ == "AdamW8bit"
        assert released.training.optimizer.bf16_stochastic_round
        before = usual.weights
        for step in range(2):
            usual.step(step)
            released.step(step)
    assert released.held == 0
    ways = [run.weights.float() - before.float() for run in (usual, released)]
    assert torch.cosine_similarity(*ways, dim=0) > 0.95  # each draws its own roundings
    moments = {type(m["exp_avg"]).__name__ for m in released.training.optimizer.state.values()}
    assert "OptimState8bit" in moments
