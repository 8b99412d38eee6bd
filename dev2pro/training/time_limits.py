"""How long a rank waits for the others: hours while one of them packs, indexes or encodes; minutes in training, where all are at the same step."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator
from torch.distributed.distributed_c10d import _set_pg_timeout

SETUP = timedelta(hours=24)  # longer than the packing of any folder; a rank that dies is noticed at once all the same
TRAINING = timedelta(minutes=10)  # longer than a measurement, and than all retries of a read (data.read.retries)


@contextmanager
def strict(accelerator: Accelerator) -> Iterator[None]:
    """Waits for every rank, then lets none wait longer than TRAINING for another one within the block.

    torchtitan sets its process groups' timeouts in the same way (`set_pg_timeouts`). Groups made by others keep torch's own limits: 10 minutes
    with NCCL, 30 with gloo.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        _set_pg_timeout(TRAINING)
    yield
    if accelerator.num_processes > 1:
        _set_pg_timeout(SETUP)
