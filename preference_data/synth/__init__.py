"""Audio made from nothing, so that every fact about it is known: speech, sound events, instruments."""
