"""Compiled jobs as people start them: several ranks, under the commands, by inductor."""

from __future__ import annotations

import shutil

import pytest

from recorder import Recording

JOB = """
    import sys, torch, torch.distributed as dist
    from recorder import context, declare_mesh, step, tap

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, scale = dist.get_rank(), float(sys.argv[1])
    declare_mesh(tp=(rank, 2))

    def layer(x, w, i):
        with context(layer=i):
            h = tap("h", torch.relu(x @ w), dims="b f[tp]", grad=True)
        return h

    def forward(x, ws):
        for i, w in enumerate(ws):
            x = x + layer(x, w, i)
        return x.square().mean()

    function = forward
    if sys.argv[2] != "eager":
        function = torch.compile(forward, backend=sys.argv[2], fullgraph=True)
    for number in range(2):
        g = torch.Generator().manual_seed(10 * number + rank)
        x = torch.randn(3, 4, generator=g) * scale
        ws = [torch.randn(4, 4, generator=g).mul(scale).requires_grad_() for _ in range(3)]
        function(x, ws).backward()
        sys.stdout.write(f"{rank} {number} {sum(w.grad.sum() for w in ws).item():.5f}\\n")
        step()
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_ranks_under_the_commands(shell, run, backend):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    shell.write("job.py", JOB)

    def job(scale, how):
        return [*shell.torchrun(2), "job.py", scale, how]

    done = shell(shell.graft, "record", "-o", run, "--", job("1.0", backend))
    assert done.returncode == 0, done.stderr
    manifest = Recording.open(run).manifest()
    assert manifest.height == 2 * 2 * 3 * 2 and set(manifest["kind"]) == {"tensor", "grad"}
    plain = shell(shell.graft, "replay", run, "--strict", "--", job("0.5", "eager"))
    assert plain.returncode == 0, plain.stderr
    done = shell(shell.graft, "replay", run, "--strict", "--", job("0.5", backend))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(plain.stdout.splitlines())
