"""What the data is: records, audio, prompts, corpora, pairs. Usable without torch."""
