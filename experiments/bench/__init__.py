"""What things cost. :mod:`bench.front` is the command line."""
