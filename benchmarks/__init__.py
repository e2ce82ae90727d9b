"""The works of bench.py: common.py times and weighs them, cpu.py and gpu.py say what they are."""
