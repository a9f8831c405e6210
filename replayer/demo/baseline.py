"""The demo's baseline job: the model as it should be."""

from .model import run_job

if __name__ == "__main__":
    run_job("baseline")
