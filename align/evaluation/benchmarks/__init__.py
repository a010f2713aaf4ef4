"""Benchmarks: their files, the tasks of both reports, how answers are scored, and published numbers."""
