"""Benchmarks, judges and the statistics of comparing two policies."""
