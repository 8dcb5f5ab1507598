"""The comparison on a real model, with real prompts: `python -m examples.benchmark.real --help`."""
