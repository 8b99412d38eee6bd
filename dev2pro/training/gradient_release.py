"""The optimizer's step inside the backward pass: each weight is updated when its gradient is there, so that one gradient is held and not all.

As in torch's tutorial, https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientRelease:
    """Steps `optimizer` in the backward pass of `parameters`.

    `clip` is the largest norm of each parameter's own gradient, because the whole one is never there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], clip: float) -> None:
        self.optimizer, self.clip = optimizer, clip
        self._squares: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        norm = torch.nn.utils.clip_grad_norm_([parameter], self.clip)
        self._squares.append(norm.float().square())
        self.optimizer.step()  # skips the others, which have no gradient
        parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of the last backward pass's whole gradient before clipping."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt()
