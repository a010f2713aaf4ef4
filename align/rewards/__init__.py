"""What a completion is worth in training: facts, transcripts, choices, form, length, a judge's score."""
