"""The demo's target job: the same model, but one layer forgot to scale its queries by 1/sqrt(d)."""

from .model import run_job

FAULTY_LAYER = 2

if __name__ == "__main__":
    run_job("target", unscaled_layer=FAULTY_LAYER)
