"""Benchmarks whose claims are computed from the rows of the same run."""
