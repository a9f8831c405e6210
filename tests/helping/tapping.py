"""Jobs of taps, for the tests of replays."""

from __future__ import annotations

import torch

from recorder import tap


def tapper(value, name="x", **tags):
    """A job of one tap; it leaves the tapped tensors of each rank in `got`."""

    def job(rank):
        t = value(rank) if callable(value) else value.clone()
        tap(name, t, **tags)
        job.got.append(t)

    job.got = []
    return job


def outcomes(session):
    return session.log()["outcome"].to_list()


def fills(*taps):
    """A job of taps (name, tags, number); what the tensors hold afterwards is in `got`."""

    def job(rank):
        for name, tags, number in taps:
            t = torch.full((1,), float(number))
            tap(name, t, **tags)
            job.got.append(t.item())

    job.got = []
    return job
