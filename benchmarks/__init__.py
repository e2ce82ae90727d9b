"""The works of `python -m benchmarks`: common.py times and weighs them, cpu.py and gpu.py say what they are."""
