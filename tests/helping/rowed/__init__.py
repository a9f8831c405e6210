"""A small decoder, the ways in which it can be run, and what each row of its taps has to be."""
