"""Taps: the line in the user's code, and who listens to it."""
