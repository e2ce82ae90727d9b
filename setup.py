"""`pip install -e .` puts the modules on the path; they are single files, not a package."""
from pathlib import Path

from setuptools import setup

setup(name="nanowan", version="0.1.0", python_requires=">=3.11",
      py_modules=sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem != "setup"))
