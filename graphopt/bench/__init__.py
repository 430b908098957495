"""Benchmarks: a model under several systems in the same run, beside the machine's measured limits."""
