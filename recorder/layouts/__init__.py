"""Layouts: where each rank's block of a tensor lies in the whole, and how blocks become others."""
