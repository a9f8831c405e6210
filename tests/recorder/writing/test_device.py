"""Copies off a device, against streams that do nothing until somebody waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager

import pytest
import torch

from recorder import Recorder, Recording, tap
from recorder.writing import staging as staging_module
from recorder.writing.device import DeviceCopies
from recorder.writing.staging import Staging

TURN = threading.RLock()


class Stream:
    def __init__(self):
        self.waiting = deque()
        self.done = 0

    def enqueue(self, work):
        self.waiting.append(work)

    def run(self, upto):
        with TURN:  # several threads wait for one copy
            while self.done < upto:
                work = self.waiting.popleft()
                work()
                self.done += 1

    @property
    def end(self):
        with TURN:  # else one that runs just now counts on neither side
            return self.done + len(self.waiting)


class Event:
    def __init__(self, stream, synchronized):
        self.stream, self.position, self.synchronized = stream, stream.end, synchronized

    def reach(self):
        self.stream.run(self.position)

    def synchronize(self):
        self.synchronized.append(self.stream)
        self.reach()


class FakeDevice:
    """A device whose tensors are ordinary ones and whose streams run when they are waited for."""

    out_of_memory = MemoryError

    def __init__(self, room=True, pins=True):
        self.job, self.own = Stream(), None
        self.now = [self.job]
        self.synchronized, self.kept, self.pinned = [], [], []
        self.room, self.pins = room, pins

    def handles(self, device):
        return True

    def pin(self, address, nbytes):
        self.pinned.append(address)
        return self.pins

    def unpin(self, address):
        self.pinned.remove(address)

    def new_stream(self, device):
        assert self.own is None, "one stream for one device"
        self.own = Stream()
        return self.own

    def current_stream(self, device):
        return self.now[-1]

    @contextmanager
    def on(self, stream):
        self.now.append(stream)
        yield
        self.now.pop()

    def record(self, stream):
        return Event(stream, self.synchronized)

    def wait(self, stream, event):
        stream.enqueue(event.reach)

    def clone(self, tensor):
        if not self.room:
            raise MemoryError
        new = torch.full(tensor.shape, -7, dtype=tensor.dtype)
        self.now[-1].enqueue(lambda: new.copy_(tensor))
        return new

    def copy(self, into, tensor):
        self.now[-1].enqueue(lambda: into.copy_(tensor))

    def keep(self, tensor, stream):
        self.kept.append(stream)


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("job_first", [True, False])
def test_a_snapshot_is_of_the_moment_of_the_tap_whichever_stream_runs_first(room, job_first):
    device = FakeDevice(room=room)
    staging = Staging(4096, DeviceCopies(device))
    x = torch.zeros(64, dtype=torch.int32)
    device.job.enqueue(lambda: x.fill_(1))  # what the job has enqueued before the tap counts
    part = staging.put(x.view(8, 8).t(), 1, hold=True)
    device.job.enqueue(lambda: x.fill_(2))  # and what comes later does not
    assert device.synchronized == [] and x[0] == 0  # the host waited for nothing
    if job_first:
        device.job.run(device.job.end)
    part.wait()
    assert set(staging.tensor(part.offset, part.nbytes).view(torch.int32).tolist()) == {1}
    assert device.synchronized == [device.own]  # never the job's stream


def test_the_jobs_stream_is_held_for_the_copy_on_the_device_alone():
    device = FakeDevice()
    Staging(4096, DeviceCopies(device)).put(torch.zeros(64), 1, hold=True)
    assert device.job.end == 1 and device.kept == [device.own]


def test_without_memory_on_the_device_the_stream_waits_for_the_copy_to_the_host():
    device = FakeDevice(room=False)
    Staging(4096, DeviceCopies(device)).put(torch.zeros(64), 1, hold=True)
    assert device.job.end == 1 and device.kept == []
    device.job.run(1)
    assert device.own.end == device.own.done


def test_the_ring_is_pinned_once_and_given_back(capsys):
    device = FakeDevice()
    staging = Staging(4096, DeviceCopies(device))
    assert device.pinned == []  # nothing came from the device yet
    for _ in range(3):
        part = staging.put(torch.zeros(4), 1, hold=True)
        part.wait()
        staging.release([part])
    assert len(device.pinned) == 1
    staging.free()
    assert device.pinned == [] and capsys.readouterr().err == ""


def test_memory_that_cannot_be_pinned_is_said_once(capsys):
    staging = Staging(4096, DeviceCopies(FakeDevice(pins=False)))
    for _ in range(2):
        staging.put(torch.zeros(4), 1, hold=True)
    staging.free()
    assert capsys.readouterr().err.count("cannot be pinned") == 1


def test_a_copy_that_fails_leaves_its_room_to_others():
    class Broken(FakeDevice):
        def clone(self, tensor):
            raise ValueError("no such thing")

    staging = Staging(1024, DeviceCopies(Broken()))
    for _ in range(100):
        with pytest.raises(ValueError):
            staging.put(torch.zeros(64), 2, hold=True)
    assert staging.backlog == 256  # of the last; the next put lets go of it
    assert staging.put_bytes(0, 0, 1, hold=True).offset == 0


def test_a_recording_waits_for_its_copies_and_nothing_else(run, monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(staging_module, "DeviceCopies", lambda: DeviceCopies(device))
    values = [torch.full((1 << 19,), float(i)) for i in range(6)]  # too large for the short way
    with Recorder(run):
        for i, value in enumerate(values):
            tap("x", value, i=i)
            device.job.enqueue(lambda value=value: value.fill_(-1.0))
        time.sleep(0.2)  # the writer is at work; the job's stream must not move for it
    assert device.synchronized and device.job not in device.synchronized
    back = Recording.open(run)
    for i in range(6):
        assert torch.equal(back.load(0, "x", i=i), torch.full((1 << 19,), float(i)))
    assert back.rows()["mean"].to_list() == [float(i) for i in range(6)]
