"""Two recordings against each other: matching, measures, verdicts, and how they are shown."""
