"""Work that a batch repeats, done once: prefix trees, attention over them, and what they cost."""
