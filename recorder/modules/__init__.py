"""Taps without edits: a table says which modules of a program are taps, and hooks make them so."""
