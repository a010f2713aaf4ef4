"""Records, audio, datasets, corpora, prompts and preferences. Usable without torch."""
