"""What a completion is worth in training: facts, transcripts, choices, form, length, judges, reward models."""
