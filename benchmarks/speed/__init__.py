"""How fast it is: `python -m benchmarks.speed` measures, judges by the goals, and writes docs/speed.md."""
