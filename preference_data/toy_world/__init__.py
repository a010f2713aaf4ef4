"""Corpora whose facts are known: synthetic audio, and the phrasebooks that ask and answer about it."""
