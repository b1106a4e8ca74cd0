"""What the authors' own layers return: inputs, weights and outputs that ``benchmarks/agreement.py`` wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

DATA = Path(__file__).parent / "data"


def assert_equal(peer: str, case: str, layer: nn.Module) -> None:
    """Our layer, with their weights, returns what theirs returns."""
    stored = load_file(DATA / f"{peer}.safetensors")
    tensors = {key[len(case) + 1 :]: t for key, t in stored.items() if key.startswith(f"{case}.")}
    x, expected = tensors.pop("x"), tensors.pop("y")
    missing = layer.load_state_dict(tensors, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    with torch.no_grad():
        found = layer.eval()(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
