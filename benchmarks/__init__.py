"""The benchmarks of `python -m benchmarks`: cpu.py and gpu.py define them, common.py measures their time and memory."""
