"""A subset of the weights is trained: the frozen ones stay bit for bit, have no state, and the others move as they would; on one rank and sharded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.errors import ConfigError
from dev2pro.models import flux1
from dev2pro.training import checkpoint, checkpoint_space, distributed, trainable
from dev2pro.training.checkpoint import CheckpointConfig, Checkpoints
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.optim import OptimConfig
from dev2pro.training.step import Training
from tests import launch
from tests.dev2pro.training import ranks as worker

SINGLE, ATTENTION = "single_transformer_blocks.*", "*.attn.*"
CONFIG = OptimConfig(lr=1e-3, schedule="constant")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


class Run:
    """Trains some of the tiny transformer's weights on inputs that depend on the step only."""

    def __init__(self, tiny: Path, out: Path, globs: list[str] | None, **hardware) -> None:
        chosen = HardwareConfig(device="cpu", threads=1, gradient_checkpointing=True, **hardware)
        self.model = trainable.select(flux1.load_transformer(str(tiny)), globs, str(tiny))
        self.training = Training(distributed.accelerator(chosen), self.model, CONFIG, chosen, steps=9, batch=2, ema=0.5)
        out.mkdir(exist_ok=True)
        self.out, self.checkpoints = out, Checkpoints(str(out), self.training, CheckpointConfig(every=1, keep=9), 9, {})

    def step(self, step: int) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(step)
        x, prompt, pooled = (torch.randn(2, *shape, generator=draw) for shape in ((16, 16), (8, 64), (64,)))
        conditioning = flux1.build_conditioning(prompt, pooled, (4, 4))

        def loss(_: range) -> torch.Tensor:
            return flux1.predict(self.training.model, x, torch.tensor([0.3, 0.7]), conditioning, 1.0).float().square().mean()

        return self.training.step(step, lambda slots: slots, loss)

    def saved(self) -> dict[str, torch.Tensor]:
        self.training.save(str(self.out), torch.float32)
        return weights(self.out)


def test_globs_name_weights_from_their_beginning_to_their_end(tiny):
    model = flux1.skeleton(str(tiny))
    every = {name for name, _ in model.named_parameters()}

    def trained(*globs: str) -> set[str]:
        trainable.select(model, list(globs), "tiny")
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    double, single = trained("transformer_blocks.*"), trained(SINGLE)
    assert double
    assert single
    assert not double & single
    assert trained("transformer_blocks.*", SINGLE) == double | single, "a later choice replaces an earlier one"
    assert trained(ATTENTION) == {name for name in every if ".attn." in name}
    assert trained("*_blocks.[1-9].*") == {name for name in double | single if ".0." not in name.partition("_blocks")[2][:3]}
    assert trained("*") == every
    assert trainable.select(flux1.skeleton(str(tiny)), None, "tiny").x_embedder.weight.requires_grad


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ([SINGLE, "blocks.0.*"], r"trainable=blocks\.0\.\* matches no weight of tiny.*names such as \S+\.weight"),
        (["transformer_blocks"], r"trainable=transformer_blocks matches no weight"),
        ([], r"trainable=\[\] would train nothing"),
    ],
)
def test_a_glob_that_matches_nothing_is_named(tiny, globs, message):
    with pytest.raises(ConfigError, match=message):
        trainable.select(flux1.skeleton(str(tiny)), globs, "tiny")


@pytest.mark.parametrize("release", [False, True], ids=["at the end", "in the backward pass"])
def test_frozen_weights_stay_bit_for_bit_and_have_no_state(tiny, tmp_path, release):
    run = Run(tiny, tmp_path, [ATTENTION], step_in_backward=release)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    norms = [run.step(step)[1] for step in range(2)]
    with run.training.ema_weights() as model:
        assert moved(before, {name: p.detach().clone() for name, p in model.named_parameters()}) == {name for name in before if ".attn." in name}
    assert moved(before, run.saved()) == {name for name in before if ".attn." in name}
    assert all((p.grad is None or not p.grad.any()) for p in run.model.parameters() if not p.requires_grad)
    assert len(run.training.optimizer.state) == len(run.training.ema.average) == sum(".attn." in name for name in before)
    assert all(norm > 0 for norm in norms)
    whole = Run(tiny, tmp_path / "whole", None, step_in_backward=release)
    assert whole.step(0)[1] > norms[0], "the gradient's other parts are not in its norm"


def test_what_is_trained_takes_the_step_it_takes_with_all(tiny, tmp_path):
    """Adam's first step is each weight's own, as long as nothing is clipped."""
    runs = [Run(tiny, tmp_path / name, globs) for name, globs in (("all", None), ("some", [SINGLE]))]
    for run in runs:
        run.training.config = OptimConfig(lr=1e-3, schedule="constant", clip=1e9)
        run.step(0)
    every, some = (run.saved() for run in runs)
    for name, value in some.items():
        if name.startswith("single"):
            torch.testing.assert_close(value, every[name], rtol=0, atol=1e-6)


def test_a_checkpoint_holds_what_is_trained_and_goes_on_with_the_same_bits(tiny, tmp_path):
    whole = Run(tiny, tmp_path / "whole", [SINGLE])
    for step in range(3):
        whole.step(step)
        whole.checkpoints.on_step_end(step + 1, [])
        whole.checkpoints.wait()
    bytes_of_state = checkpoint_space.state_bytes(checkpoint_space.trained(whole.model), CONFIG, True)
    assert sum(value.numel() * value.element_size() for value in checkpoint._tensors(whole.training).values()) == bytes_of_state
    everything = checkpoint_space.state_bytes(flux1.skeleton(str(tiny)).parameters(), CONFIG, True)
    assert bytes_of_state < 0.7 * everything
    again = Run(tiny, tmp_path / "again", [SINGLE])
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "again/checkpoint-2")
    assert again.checkpoints.restore()[0] == 2
    again.step(2)
    assert moved(whole.saved(), again.saved()) == set()


def test_two_sharded_ranks_keep_frozen_weights_beside_trained_ones(tiny, tmp_path):
    hardware = {"device": "cpu", "threads": 1, "micro_batch": 2, "gradient_checkpointing": True}
    globs = [SINGLE, "*.attn.to_[qkv].weight"]  # whole blocks, and a part of others
    seen = {}
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        words = [worker.__file__, str(tiny), str(tmp_path / name), json.dumps({**hardware, "shard": ranks > 1}), "3", *globs]
        launch.on_ranks(words, ranks) if ranks > 1 else launch.forks(words, [{}])
        seen[name] = json.loads((tmp_path / name / "rank-0.json").read_text())
    assert seen["two"]["sharded"]
    assert seen["two"]["types"] == seen["two"]["moments"] == ["DTensor"]
    assert seen["two"]["losses"] == pytest.approx(seen["one"]["losses"], rel=1e-4)
    base = {name: p.detach() for name, p in flux1.load_transformer(str(tiny)).named_parameters()}
    chosen = {name for name, p in trainable.select(flux1.skeleton(str(tiny)), globs, "tiny").named_parameters() if p.requires_grad}
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert moved(base, two) == moved(base, one) == chosen
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    shutil.rmtree(tmp_path / "two/checkpoint-3")
    launch.on_ranks([worker.__file__, str(tiny), str(tmp_path / "two"), json.dumps({**hardware, "shard": True}), "3", *globs], 2)
    assert json.loads((tmp_path / "two/rank-0.json").read_text())["start"] == 2
    assert moved(two, weights(tmp_path / "two")) == set(), "bit for bit on the same number of ranks"
