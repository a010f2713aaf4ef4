"""Judges that score answers: by the facts of synthetic clips, or a language model asked in both orders."""
