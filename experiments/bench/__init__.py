"""Benchmarks of speed, memory and compile time. :mod:`bench.front` is the command line."""
