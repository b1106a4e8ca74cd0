"""All methods side by side: `python -m benchmarks.methods` trains, times, and fills in docs/methods/README.md."""
