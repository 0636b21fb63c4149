"""Benchmarks: `python -m bench` runs all and writes RESULTS.md; `python -m bench.serve` and the others run alone."""
