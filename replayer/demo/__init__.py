"""The `graft demo` jobs: a small transformer cut over 4 ranks, and over 2 with a planted fault."""
