"""`python -m torch.distributed.run --standalone --nproc-per-node 2 -m zoo.training_job OUT`."""

import functools

import torch.distributed as dist

from .jobs import run
from .training import Training
from .training_cases import cases


@functools.lru_cache
def alone():
    """Return a group of this rank alone, for what is reduced over the wrong ranks."""
    return [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]


if __name__ == "__main__":
    run(
        cases,
        lambda options, seed: Training(options, seed).run(),
        lambda case, seed, rank, group: Training(case.target, seed, rank, group, alone()).run(),
        lambda case: 2,
    )
