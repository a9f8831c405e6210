"""The commands that replay, compare and explain."""
