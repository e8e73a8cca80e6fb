"""Benchmarks of resode_cuda: `python -m bench` measures memory, time, gradient error and accuracy."""
