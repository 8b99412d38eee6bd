"""The dispatch mode counts what is alive, once, and the FLOPs that torch's own counter has."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from dev2pro.planning.live_bytes import LiveBytes

KIB = 1024


def test_a_storage_counts_once_and_until_its_end():
    with LiveBytes() as live:
        first = torch.zeros(256)
        views = [first[:7], first.view(16, 16), first.t()]
        assert live.now == KIB
        second = first + 1
        assert live.now == 2 * KIB
        del first
        assert live.now == 2 * KIB  # the views keep it
        del views
        assert live.now == KIB
        del second
    assert (live.now, live.peak) == (0, 2 * KIB)


def test_an_operation_in_place_adds_nothing():
    with LiveBytes() as live:
        torch.zeros(256).add_(1).mul_(2)
    assert live.peak == KIB


def test_what_is_older_counts_from_when_it_is_noted():
    older = torch.zeros(256)
    with LiveBytes() as live:
        kept = older * 2
        assert live.now == KIB
        live.note([older, {"again": older[1:]}])
        assert live.now == 2 * KIB
    assert kept.sum() == 0


def test_what_backward_needs_is_alive_until_backward():
    weight = torch.zeros(256, requires_grad=True)
    with LiveBytes() as live:
        loss = weight.exp().exp().sum()
        assert live.now == 2 * KIB + 4  # both results of exp, and the sum
        loss.backward()
        del loss
        assert live.now == KIB  # the gradient
    assert weight.grad is not None


def test_the_flops_are_those_of_torch_s_counter_and_of_attention():
    a, b = torch.ones(8, 16), torch.ones(16, 32)
    image, kernel = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)
    with LiveBytes() as live, FlopCounterMode(display=False) as counter:
        a @ b
        torch.nn.functional.conv2d(image, kernel)
    assert live.flops == counter.get_total_flops() == 2 * 8 * 16 * 32 + 2 * 4 * 36 * 27
    with LiveBytes() as live:
        torch.nn.functional.scaled_dot_product_attention(*(torch.ones(1, 2, 64, 32) for _ in range(3)))
    assert live.flops == 2 * (2 * 2 * 64 * 64 * 32)  # two products of each of the two heads
