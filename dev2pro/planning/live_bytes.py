"""Adds up the bytes of the tensors that are alive, and the FLOPs, operation by operation, on real tensors and on fake ones."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
ON_GPU = {  # attention on a CPU, which torch's table of formulas lacks -> the same on a GPU
    ATEN._scaled_dot_product_flash_attention_for_cpu: ATEN._scaled_dot_product_flash_attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: ATEN._scaled_dot_product_flash_attention_backward,
}


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of the storages that operations returned and that are alive; `peak`: the most there were at one time.

    A storage counts once however many views it has, from the first operation that returns a tensor on it to its end. What is older counts
    from when it is given to `note`. `flops`: of products, convolutions and attention, by the formulas of torch's FlopCounterMode, which
    itself keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.flops, self._known = 0, 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        packet = func._overloadpacket
        if formula := flop_registry.get(ON_GPU.get(packet, packet)):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def note(self, tensors: Any) -> None:
        """Counts the storages of all tensors in any nesting."""
        for leaf in tree_leaves(tensors):
            for plain in plain_tensors(leaf) if isinstance(leaf, Tensor) else ():
                storage = plain.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """A tensor, or the parts of an int8 or 8-bit one."""
    if isinstance(tensor, FakeTensor) or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in plain_tensors(getattr(tensor, name))]
