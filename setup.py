"""Packaging. What the project needs and why is told in docs/decisions/0004-dependencies.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "dyncompress/__init__.py").read_text("utf-8"), re.M)[1]

# 2.6.2 and 2.6.3 were published by an attacker and steal credentials on import (GHSA-w37p-236h-pfx3).
CLEAN = ">=2.2,!=2.6.2,!=2.6.3"

EXPORT = ["onnx", "onnxscript", "onnxruntime"]
RECIPES = ["scikit-learn", "pyarrow", "pillow", "huggingface-hub"]
TEST = [
    "pytest>=8.1", "pytest-timeout", "pytest-cov", "pytest-xdist", "hypothesis", "tensorboard",
    f"lightning{CLEAN}", *EXPORT, *RECIPES,
]  # fmt: skip
DEV = ["ruff", "mypy", "types-PyYAML", *TEST]

setup(
    name="dyncompress",
    version=VERSION,
    description="Compress a trained CNN to a FLOPs target with dynamic convolutions and PyTorch Lightning",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dyncompress", "dyncompress.*"]),
    package_data={"dyncompress": ["py.typed"]},
    install_requires=[
        "torch>=2.4",
        f"pytorch-lightning{CLEAN}",
        "torchmetrics>=1.0",
        "ptflops>=0.7.5",
        "wandb>=0.18",  # 0.17 has names that NumPy 2 dropped
        "rich",
        "jsonargparse[signatures]>=4.39",
        "safetensors",
        "numpy",
        "matplotlib",
    ],
    extras_require={"export": EXPORT, "recipes": RECIPES, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["dyncompress = dyncompress.cli:main"]},
)
