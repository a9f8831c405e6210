"""Copies off a device, against streams that do nothing until somebody waits."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from contextlib import contextmanager

import pytest
import torch

from recorder import Recorder, Recording, tap
from recorder.writing import device as device_module
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

    def synchronize(self):
        self.run(self.end)

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

    def __init__(self, room=True, pins=True, foresees=True):
        self.job, self.own = Stream(), None
        self.now = threading.local()  # each thread has its own current stream, as torch's do
        self.synchronized, self.pinned, self.used, self.brought = [], [], [], []
        self.was_full_at = []
        self.waits = self.clones = 0
        self.room, self.pins, self.foresees = room, pins, foresees

    def handles(self, device):
        return True

    def use(self, device):
        self.used.append(threading.current_thread())

    def has_room(self, device, nbytes):
        return self.room or not self.foresees

    def was_full(self, device):
        self.was_full_at.append(device)

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
        return getattr(self.now, "stream", self.job)

    @contextmanager
    def on(self, stream):
        before, self.now.stream = self.current_stream(None), stream
        yield
        self.now.stream = before

    def record(self, stream):
        return Event(stream, self.synchronized)

    def wait(self, stream, event):
        self.waits += 1
        stream.enqueue(event.reach)

    @contextmanager
    def relaxed(self):
        self.is_relaxed = True
        yield
        self.is_relaxed = False

    def clone(self, tensor):
        self.clones += 1
        if not self.room:
            raise MemoryError
        new = torch.full(tensor.shape, -7, dtype=tensor.dtype)
        self.current_stream(None).enqueue(lambda: new.copy_(tensor))
        return new

    def copy(self, into, tensors):
        self.brought.append(len(into))
        for one, tensor in zip(into, tensors, strict=True):
            self.current_stream(None).enqueue(lambda one=one, tensor=tensor: one.copy_(tensor))


def staged(staging, tensor, users=1):
    """Put a tensor as the writer does."""
    part = staging.put(tensor, users, hold=True)
    part.payload = "a payload"
    return part


def brought(staging, *parts):
    staging.bring(parts)
    for part in parts:
        part.wait()
    return [staging.tensor(part.offset, part.nbytes) for part in parts]


@pytest.mark.parametrize("job_first", [True, False])
def test_a_snapshot_is_of_the_moment_of_the_tap_whichever_stream_runs_first(job_first):
    device = FakeDevice()
    staging = Staging(4096, DeviceCopies(device))
    x = torch.zeros(64, dtype=torch.int32)
    device.job.enqueue(lambda: x.fill_(1))  # what the job has enqueued before the tap counts
    part = staged(staging, x.view(8, 8).t())
    device.job.enqueue(lambda: x.fill_(2))  # and what comes later does not
    assert device.synchronized == [] and x[0] == 0  # the host waited for nothing
    if job_first:
        device.job.run(device.job.end)
    (found,) = brought(staging, part)
    assert set(found.view(torch.int32).tolist()) == {1}
    assert device.synchronized == [device.own]  # never the job's stream


def test_a_tap_asks_nothing_of_the_device_but_a_copy_aside():
    device = FakeDevice()
    staging = Staging(4096, DeviceCopies(device))
    part = staged(staging, torch.zeros(64))
    assert device.job.end == 1 and device.clones == 1
    assert device.own is None and device.pinned == [] and device.waits == 0
    part.wait()  # nobody has begun to bring it, and nobody will
    assert part.arrival.aside is not None and device.synchronized == []


def test_many_come_with_one_copy_and_one_wait_for_each_stream_of_the_job(monkeypatch):
    device = FakeDevice()
    staging = Staging(1 << 16, DeviceCopies(device))
    parts = [staged(staging, torch.full((8, 2), float(i))) for i in range(5)]
    other = Stream()
    with device.on(other):
        parts += [staged(staging, torch.full((3,), float(i))) for i in range(5, 7)]
    found = brought(staging, *parts)
    assert [set(one.view(torch.float32).tolist()) for one in found] == [
        {float(i)} for i in range(7)
    ]
    assert device.brought == [7] and device.waits == 2
    assert all(part.arrival.aside is None for part in parts)  # the device has its memory again
    staging.bring(parts)
    assert device.brought == [7]


def test_what_follows_comes_meanwhile_and_large_ones_are_waited_for_by_themselves(monkeypatch):
    monkeypatch.setattr(device_module, "_TOGETHER", 256)
    device = FakeDevice()
    staging = Staging(1 << 16, DeviceCopies(device))
    parts = [staged(staging, torch.full((n,), 1.0)) for n in (32, 32, 16, 100, 8)]
    plain = staging.put_bytes(0, 0, 1, hold=True)
    staging.bring([plain], parts)
    assert device.brought == []  # nothing came from a device: nobody looks further
    staging.bring(parts[:1], parts[1:])
    assert device.brought == [2, 2, 1]
    parts[0].wait()
    assert parts[1].arrival.done is parts[0].arrival.done
    assert parts[3].arrival.done is not parts[0].arrival.done


@pytest.mark.parametrize("foresees", [True, False])
def test_without_memory_on_the_device_the_stream_waits_for_the_copy_to_the_host(foresees):
    device = FakeDevice(room=False, foresees=foresees)
    staging = Staging(4096, DeviceCopies(device))
    x = torch.zeros(64)
    device.job.enqueue(lambda: x.fill_(1.0))
    part = staged(staging, x)
    device.job.enqueue(lambda: x.fill_(2.0))
    assert device.clones == (not foresees)  # to try costs the job all that its allocator keeps
    assert len(device.was_full_at) == (not foresees)
    device.job.run(device.job.end)
    assert device.own.end == device.own.done and device.used == []
    assert set(brought(staging, part)[0].view(torch.float32).tolist()) == {1.0}
    assert device.brought == [1]


@pytest.mark.parametrize("foresees", [True, False])
def test_without_memory_for_one_that_is_not_contiguous_its_record_is_dropped_and_said(
    run, monkeypatch, capsys, foresees
):
    device = FakeDevice(room=False, foresees=foresees)
    monkeypatch.setattr(staging_module, "DeviceCopies", lambda: DeviceCopies(device))
    big = torch.arange(1 << 19, dtype=torch.float32).view(1 << 10, 1 << 9)
    with Recorder(run):
        tap("cut", big.t())
        tap("whole", big)
        device.job.run(device.job.end)
    back = Recording.open(run)
    assert back.rows()["name"].to_list() == ["whole"] and torch.equal(back.load(0, "whole"), big)
    err = capsys.readouterr().err
    assert "tap 'cut' at " in err and "the device has no memory left for a copy" in err


def test_the_ring_is_pinned_once_and_given_back(capsys):
    device = FakeDevice()
    staging = Staging(4096, DeviceCopies(device))
    assert device.pinned == []  # nothing came from the device yet
    for _ in range(3):
        part = staged(staging, torch.zeros(4))
        brought(staging, part)
        staging.release([part])
    assert len(device.pinned) == 1
    staging.free()
    assert device.pinned == [] and capsys.readouterr().err == ""


def test_memory_that_cannot_be_pinned_is_said_once(capsys):
    staging = Staging(4096, DeviceCopies(FakeDevice(pins=False)))
    for _ in range(2):
        brought(staging, staged(staging, torch.zeros(4)))
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


@pytest.mark.parametrize("call", ["copy", "record", "wait"])
def test_a_copy_that_was_interrupted_writes_to_no_other_s_room(call):
    """Ctrl-C between a copy's start and the note of it, on a device without room."""
    device = FakeDevice(room=False)
    on_device = [True]
    device.handles = lambda of: on_device[0]
    real = getattr(device, call)

    def interrupted(*args):
        found = real(*args)
        if device.brought:
            raise KeyboardInterrupt
        return found

    setattr(device, call, interrupted)
    staging = Staging(4096, DeviceCopies(device))
    with pytest.raises(KeyboardInterrupt):
        staging.put(torch.full((64,), 111, dtype=torch.int32), 1, hold=True)
    setattr(device, call, real)
    on_device[0] = False
    value = torch.full((64,), 5, dtype=torch.int32)
    part = staging.put_bytes(value.data_ptr(), 256, 1, hold=True)
    part.payload = "a payload"
    device.own.synchronize()
    found = staging.tensor(part.offset, 256).view(torch.int32)
    assert set(found.tolist()) == {5}


def test_a_recording_waits_for_its_copies_and_nothing_else(run, monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(staging_module, "DeviceCopies", lambda: DeviceCopies(device))
    values = [torch.full((1 << 19,), float(i)) for i in range(6)]  # too large for the short way
    with Recorder(run) as recorder:
        for i, value in enumerate(values):
            tap("x", value, i=i)
            device.job.enqueue(lambda value=value: value.fill_(-1.0))
        writer = recorder._writer._thread
        time.sleep(0.2)  # the writer is at work; the job's stream must not move for it
    assert device.synchronized and device.job not in device.synchronized
    assert set(device.used) == {writer}  # the job's threads keep their own device
    back = Recording.open(run)
    for i in range(6):
        assert torch.equal(back.load(0, "x", i=i), torch.full((1 << 19,), float(i)))
    assert back.rows()["mean"].to_list() == [float(i) for i in range(6)]


@pytest.mark.parametrize("when_full", ["hold", "drop"])
def test_more_than_the_ring_holds_comes_whole_in_turn(run, monkeypatch, when_full):
    """Every record is what it was or is not there, whatever room there was."""
    device = FakeDevice()
    monkeypatch.setattr(staging_module, "DeviceCopies", lambda: DeviceCopies(device))
    with Recorder(run, staging=8 << 20, when_full=when_full):
        for i in range(40):
            value = torch.full((700, 1000), float(i))
            tap("x", value, i=i)
            device.job.enqueue(lambda value=value: value.fill_(-1.0))
    back = Recording.open(run)
    rows = back.rows()
    assert rows.height == 40 if when_full == "hold" else rows.height >= 1
    for tags in rows["tags"].to_list():
        i = json.loads(tags)["i"]
        assert torch.equal(back.load(0, "x", i=i), torch.full((700, 1000), float(i)))
