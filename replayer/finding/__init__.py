"""Find the fault: what a trial under graft tells of where it is."""
