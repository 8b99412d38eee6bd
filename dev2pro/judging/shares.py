"""Work shared among the ranks: each does every n-th job, and all of them get every result."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

J = TypeVar("J")
R = TypeVar("R")


def share(accelerator: Accelerator, jobs: Sequence[J], work: Callable[[J], R]) -> list[R]:
    """The results of `work` for all jobs, in their order, on every rank. Call it on every rank with the same jobs."""
    mine = range(accelerator.process_index, len(jobs), accelerator.num_processes)
    results = gather_object([(number, work(jobs[number])) for number in mine])
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]
