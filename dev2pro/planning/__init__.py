"""What a run will need, before it is paid for: memory, disk, FLOPs and time, from the real modules without their weights."""
