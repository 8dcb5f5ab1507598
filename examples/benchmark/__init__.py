"""One harness for every comparison: `python -m examples.benchmark --help`."""
