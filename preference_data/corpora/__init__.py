"""Corpora of others and yours: fetched, read in their own layouts, and prepared as datasets."""
