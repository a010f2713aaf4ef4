"""What a completion is worth: facts, transcripts, choices, form, length, judges, reward models."""
