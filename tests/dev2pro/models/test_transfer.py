import pytest
import torch

from dev2pro.models.transfer import to_device

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(3, dtype=torch.uint8)
    assert to_device(tensor, CPU).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_a_cuda_device_gets_it_from_pinned_memory_without_waiting(monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(pin(tensor)) or pinned[-1])
    device, tensor = torch.device("cuda"), torch.arange(1 << 24, dtype=torch.uint8)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles
    before = torch.cuda.Event()
    before.record()
    moved = to_device(tensor, device)
    assert not before.query()  # the device still sleeps: nobody has waited for it
    assert pinned[0].is_pinned()
    assert torch.equal(moved.cpu(), tensor)
    assert to_device(moved, device) is moved
