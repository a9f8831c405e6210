"""Models with planted faults and clean variants, for measuring how well faults are named."""
