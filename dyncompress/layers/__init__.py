"""Dynamic convolutions: shapes, methods, and the layers that they build.

Importing this package registers the methods of the library; others register with the same decorator.
"""

from __future__ import annotations

from dyncompress.layers.auto import Auto
from dyncompress.layers.c2sp import C2sp
from dyncompress.layers.condconv import CondConv
from dyncompress.layers.dcd import Dcd
from dyncompress.layers.drconv import DRConv
from dyncompress.layers.dyco3d import DyCo3d
from dyncompress.layers.dyconv import DyConv
from dyncompress.layers.dynet import DyNet
from dyncompress.layers.kernelwarehouse import KernelWarehouse
from dyncompress.layers.method import DynamicConv, Method, configured, get_method, list_methods, register_method
from dyncompress.layers.odconv import ODConv
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static, load_static
from dyncompress.layers.tokens import TokenConv

__all__ = [
    "Auto",
    "C2sp",
    "CondConv",
    "ConvSite",
    "ConvSpec",
    "DRConv",
    "Dcd",
    "DyCo3d",
    "DyConv",
    "DyNet",
    "DynamicConv",
    "KernelWarehouse",
    "Macs",
    "Method",
    "ODConv",
    "Static",
    "TokenConv",
    "configured",
    "get_method",
    "list_methods",
    "load_static",
    "register_method",
]
