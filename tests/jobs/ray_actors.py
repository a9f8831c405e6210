"""Two actors of a local Ray cluster, each with a model, and an environment that comes late."""

import json
import os
import sys
import time

import ray


@ray.remote(num_cpus=1)
class Actor:
    def __init__(self, rank, late):
        import torch  # before the environment is there

        os.environ.update(late, RANK=str(rank), WORLD_SIZE="2")
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())

    def run(self):
        import torch

        for _ in range(2):
            self.model(torch.ones(2, 4))
        return os.getpid()


ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
actors = [Actor.remote(rank, json.loads(sys.argv[1])) for rank in range(2)]
print(len(set(ray.get([actor.run.remote() for actor in actors]))))
for actor in actors:
    actor.__ray_terminate__.remote()
time.sleep(0.5)
ray.shutdown()
