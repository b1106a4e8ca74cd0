"""Accuracy held, against controls that try hard: `python -m benchmarks.accuracy` trains, times, writes the page."""
