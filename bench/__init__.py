"""Benchmarks: `python -m bench.serve`, `python -m bench.scale`, `python -m bench.crc`."""
