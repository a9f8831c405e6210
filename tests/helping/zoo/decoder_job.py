"""`python -m torch.distributed.run --standalone --nproc-per-node 2 -m zoo.decoder_job OUT`."""

from .decoder import Decoder
from .decoder_cases import cases
from .jobs import run

if __name__ == "__main__":
    run(
        cases,
        lambda options, seed: Decoder(options, 0).run(),
        lambda case, seed, rank, group: Decoder(case.target, rank, group).run(),
        lambda case: case.target.tp,
    )
