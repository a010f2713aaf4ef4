"""Untrusted audio files: where their bytes are, decoded to 16 kHz mono, checked, compared."""
