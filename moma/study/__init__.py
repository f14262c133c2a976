"""Comparison of runs: speed-up factors and the report."""
