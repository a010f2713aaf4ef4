"""Runs a recipe: what is done and left, one attempt at a stage, workers on a Ray cluster, cluster files."""
