"""Benchmarks: `python -m benchmarks` runs those of cpu.py, gpu.py and full_size.py; common.py has what they share."""
