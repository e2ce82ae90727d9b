"""The commands of diag.py, one file each."""
