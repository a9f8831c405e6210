"""What a recording is on disk, writer and reader of each file side by side."""
