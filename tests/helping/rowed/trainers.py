"""Trainers of the decoder: micro-batches, padded or packed, with their layers checkpointed or not.

Which sequence a gradient is of is more than its prefix says: no two here begin alike, but where a
test wants it so.
"""

from __future__ import annotations

import torch

from recorder import rows, step

from .ids import prefix_ids
from .model import Decoder, Segment
from .requests import REQUESTS
from .schedules import Schedule, padded_ids
from .views import View

APART = [REQUESTS[0], REQUESTS[2], REQUESTS[4], [1, *REQUESTS[2]]]


def trainer(packed=False, sequences=APART, micro=1, checkpoint=None, last_first=False, salts=None):
    """A step of training.

    Args:
        packed: whether sequences stand one behind the other, else padded on the left.
        sequences: their tokens.
        micro: over how many batches they are dealt out, whose ids take turns in one buffer.
        checkpoint: what layers are called by.
        last_first: whether the last batch is the first to go backward.
        salts: of each sequence's ids.
    """
    salts = salts or [0] * len(sequences)

    def play(rank, log, salt):
        with torch.enable_grad():
            buffer, losses = torch.zeros(4096, dtype=torch.int64), []
            for number in range(micro):
                chosen = [*range(number, len(sequences), micro)]
                losses.append(batch(log, chosen, buffer))
            buffer.fill_(-1)
            for loss in losses[::-1] if last_first else losses:
                loss.backward()
        step()
        log.next_step()

    def batch(log, chosen, buffer):
        table, segments, shape = [], [], ()
        if packed:
            for i in chosen:
                segments.append(Segment(sequences[i], 0, len(table)))
                table += prefix_ids(sequences[i], salts[i])
            table += [-1, -1]
            shape, lead = (len(table),), "t"
        else:
            width = max(len(sequences[i]) for i in chosen) + 1
            shape, lead = (len(chosen), width), "b s"
            for row, i in enumerate(chosen):
                ((ids,), (start,)) = padded_ids([sequences[i]], width, True, salts[i])
                segments.append(Segment(sequences[i], 0, row * width + start))
                table += ids
        ids = buffer[: len(table)].copy_(torch.tensor(table)).view(shape)
        view = View(log, table, shape, lead, grads=True, at_taps=False)
        with rows({lead: ids}):
            logits = Decoder(checkpoint=checkpoint, trains=True)(segments, len(table), view)
        losses = []
        for one in segments:
            there = logits[one.at : one.at + one.length - 1]
            next_ones = torch.tensor(one.tokens[1:])
            losses.append(torch.nn.functional.cross_entropy(there, next_ones, reduction="sum"))
        return sum(losses)

    return Schedule(play)
