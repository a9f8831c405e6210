"""From a snapshot to bytes on disk, behind the job's back."""
