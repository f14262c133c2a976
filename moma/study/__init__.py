"""Comparisons between runs: speed-up factors, the demo and the report."""
