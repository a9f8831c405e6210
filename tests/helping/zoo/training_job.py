"""`python -m torch.distributed.run --standalone --nproc-per-node 2 -m zoo.training_job OUT`."""

from .jobs import run
from .training import Trainer
from .training_cases import cases

if __name__ == "__main__":
    run(
        cases,
        lambda options: Trainer(options).run(),
        lambda case, rank, group: Trainer(case.target, rank, case.faults).run(),
        lambda case: case.target.ranks,
    )
