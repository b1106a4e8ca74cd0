"""Compress a trained CNN to a FLOPs target with dynamic convolutions.

A network is traced, planned, converted and distilled; each stage is one function and can be used alone, and
`DynCompress` does all of them inside a PyTorch Lightning `Trainer`. Methods are in `dyncompress.layers`.

Every name is imported on first use, so that `import dyncompress` loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyncompress.bundle import load, save
    from dyncompress.callback import DynCompress
    from dyncompress.checkpoint import load_from_checkpoint
    from dyncompress.conversion import convert
    from dyncompress.distillation import DistillConfig
    from dyncompress.errors import DynCompressError
    from dyncompress.evaluation import evaluate
    from dyncompress.exporting import export
    from dyncompress.folding import fold
    from dyncompress.layers.inference import reuse_kernels
    from dyncompress.plan import Plan
    from dyncompress.planning import make_plan
    from dyncompress.report import Report
    from dyncompress.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "DistillConfig",
    "DynCompress",
    "DynCompressError",
    "Plan",
    "Report",
    "convert",
    "evaluate",
    "export",
    "fold",
    "load",
    "load_from_checkpoint",
    "make_plan",
    "reuse_kernels",
    "save",
    "trace",
]

# No module may be called like a public function: importing it would put the module in the function's place.
_HOME = {
    "DistillConfig": "distillation",
    "DynCompress": "callback",
    "DynCompressError": "errors",
    "Plan": "plan",
    "Report": "report",
    "convert": "conversion",
    "evaluate": "evaluation",
    "export": "exporting",
    "fold": "folding",
    "load": "bundle",
    "load_from_checkpoint": "checkpoint",
    "make_plan": "planning",
    "reuse_kernels": "layers.inference",
    "save": "bundle",
    "trace": "tracing",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # asked once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
