"""Dynamic convolutions: shapes, methods, and the layers that they build.

Importing this package registers the methods of the library; others register with the same decorator.
"""

from __future__ import annotations

from dyncompress.layers.dynet import DyNet
from dyncompress.layers.method import DynamicConv, Method, configured, get_method, list_methods, register_method
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static, load_static

__all__ = [
    "ConvSite",
    "ConvSpec",
    "DyNet",
    "DynamicConv",
    "Macs",
    "Method",
    "Static",
    "configured",
    "get_method",
    "list_methods",
    "load_static",
    "register_method",
]
