"""One assembly for every way to train through TRL: data, memory, checkpoints, checks before a step."""
