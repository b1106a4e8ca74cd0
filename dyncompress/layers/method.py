"""What a dynamic-convolution method is: a map from sites to costs and from sites to modules.

A method is a frozen dataclass of options, registered under a name. Its interface is plural (``sites``, not
``site``) since layers may share a router or kernels; such layers are built together, in execution order.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, UnknownMethodError, shown
from dyncompress.layers.channels import scaled
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs

__all__ = [
    "DEFAULT", "DynamicConv", "Method", "PerLayer", "configured", "get_method", "list_methods", "register_method"
]  # fmt: skip

DEFAULT = "auto"  # the method where none is named; why: docs/decisions/0009-auto-is-the-default.md


@runtime_checkable
class Method(Protocol):
    """A way to replace convolutions, as a frozen dataclass of options.

    Its layers keep the contract of ``tests/layers/contract.py``; where one cannot keep a clause, the method says
    why in a class attribute ``exceptions``, {clause: reason}. Another, ``adapts``, says in a few words what of a layer
    depends on its input, for `dyncompress methods`. Where ``linear``, a class attribute or an option, is True, linear
    layers are sites, too: as pointwise convolutions over the positions of one dimension.

    Attributes:
        name: Registered name, set by :func:`register_method`.
        paper: Where the method is from; empty when it is no invention.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def sharing(self) -> Literal["layer", "block", "stage"]:
        """Which layers are built together: each alone, those of one block, or all that read maps of one size."""
        ...

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """The method to use on a site, and the reason when it is not this one unchanged ("" otherwise)."""
        ...

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per site for one image, for sites built together in execution order."""
        ...

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters per site; entry i is ``numel`` of the i-th module that :meth:`build` returns."""
        ...

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One module per site, freshly initialised, for sites built together in execution order."""
        ...


class PerLayer:
    """Base of methods whose layers are built each alone."""

    @property
    def sharing(self) -> Literal["layer"]:
        """Each layer is built alone."""
        return "layer"


class DynamicConv(nn.Module):
    """Base of every layer whose kernel depends on its input.

    A subclass says in :meth:`forward` what it computes and in :meth:`start` where it starts. It takes what nn.ConvNd
    takes and returns what it returns: x [B, in, *size] -> [B, out, *size']. It has nn.ConvNd's attributes too
    (``out_channels``, ``stride``, ...), for code that reads them.

    Args:
        spec: Shapes of the convolution that the layer replaces.
    """

    method: ClassVar[str] = ""
    shared: ClassVar[tuple[str, ...]] = ()  # parameters that layers built together with this one read, too
    transposed: ClassVar[bool] = False

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_channels, self.out_channels, self.groups = spec.in_channels, spec.out_channels, spec.groups
        self.kernel_size, self.stride, self.dilation = spec.kernel_size, spec.stride, spec.dilation
        self.padding, self.padding_mode = spec.padding, spec.padding_mode

    @torch.no_grad()
    def load_static(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        spare: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start as a static convolution: the layer computes ``conv(x, weight, bias)`` until it is trained.

        Args:
            weight: [out, in / groups, *kernel], the static kernel.
            bias: [out], or None for zeros.
            spare: [n, in / groups, *kernel], filters that narrowing discarded; they seed the bank.
            generator: Random numbers for what breaks the symmetry of the bank; torch's default one if None.

        Raises:
            DynCompressError: If a shape differs from the spec's.
        """
        self.check_static(weight, bias, spare)
        bias = weight.new_zeros(self.out_channels) if bias is None else bias
        self.start(weight, bias, spare, generator)
        own = getattr(self, "bias", None)
        if own is not None:
            own.copy_(bias)

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """A subclass's part of :meth:`load_static`, which checks the shapes and sets a parameter ``bias`` itself."""
        raise NotImplementedError(f"{type(self).__name__} must implement start")

    def anneal(self, progress: float) -> None:
        """Follow a schedule; called before every training batch. Most layers have none.

        What it sets is to be kept in a persistent buffer, and never to go back: a second training starts at 0 again.

        Args:
            progress: The part of the training that is over, from 0 to 1.
        """

    @classmethod
    def shipped(cls, layers: Sequence[Any]) -> list[nn.Module]:
        """Layers that were built together, as they are shipped: the same numbers, sooner; by default as they are.

        Args:
            layers: Of this class, in execution order. They are not changed.

        Returns:
            One module per layer.
        """
        return list(layers)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Become the same layer with an affine map of each output channel behind it, scale * y + shift; for `fold`.

        By default a layer that is linear in ``bank`` [out, ...], and adds ``bias``, can.

        Args:
            scale: [out].
            shift: [out].

        Returns:
            Whether it could. If not it is as before, and the BatchNorm behind it stays.
        """
        bank: Any = getattr(self, "bank", None)
        if bank is None:
            return False
        bank.data = scaled(bank.data, scale)
        self.absorb_in_bias(scale, shift, bank.dtype)
        return True

    def absorb_in_bias(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        """The part of :meth:`absorb` that a static ``bias`` [out] (or None) has in it."""
        bias: Any = self.bias
        moved = shift if bias is None else bias.data * scale + shift
        self.register_parameter("bias", nn.Parameter(moved.to(dtype)))

    def check_input(self, x: Tensor) -> None:
        """Raise unless x is [B, in, *size]."""
        if x.ndim != self.spec.ndim + 2 or x.shape[1] != self.spec.in_channels:
            raise DynCompressError(
                f"input has shape {tuple(x.shape)}; this layer ({self.spec}) takes a batch of "
                f"{self.spec.in_channels} channels and {self.spec.ndim} spatial dimensions: reshape it"
            )

    def check_static(self, weight: Tensor, bias: Tensor | None, spare: Tensor | None = None) -> None:
        """Raise unless the tensors have the shapes that :meth:`load_static` takes."""
        spec = self.spec
        if tuple(weight.shape) != spec.weight_shape:
            raise DynCompressError(
                f"weight has shape {tuple(weight.shape)}; this layer ({spec}) takes {spec.weight_shape}: "
                "narrow the weight first"
            )
        if bias is not None and (not spec.bias or tuple(bias.shape) != (spec.out_channels,)):
            allowed = f"shape ({spec.out_channels},)" if spec.bias else "none"
            raise DynCompressError(
                f"bias has shape {tuple(bias.shape)}; this layer ({spec}) takes {allowed}: match the spec"
            )
        if spare is not None and tuple(spare.shape[1:]) != spec.weight_shape[1:]:
            raise DynCompressError(
                f"spare filters have shape {tuple(spare.shape)}; this layer ({spec}) takes (n, "
                f"{', '.join(map(str, spec.weight_shape[1:]))}): select the kept input channels first"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicConv:
        # A bank has one dimension more than a kernel: ``.to(memory_format=...)`` would take it for a kernel of one more
        # spatial dimension, and fail or scatter it in memory.
        def apply(t: Tensor) -> Tensor:
            return fn(t.flatten(2)).reshape(t.shape) if t.ndim > self.spec.ndim + 2 else fn(t)

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Method and shapes."""
        return f"{self.method}, {self.spec}"


M = TypeVar("M", bound=type[Method])

_METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known under ``name``.

    Args:
        name: How plans and users call the method.

    Raises:
        DynCompressError: If the name is taken.
    """

    def register(method: M) -> M:
        if name in _METHODS:
            raise DynCompressError(
                f"method {name!r} is already registered by {_METHODS[name].__qualname__}: choose another name"
            )
        method.name = name
        _METHODS[name] = method
        return method

    return register


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str, /, **options: Any) -> Method:
    """A method by its name.

    Args:
        name: One of :func:`list_methods`.
        **options: Fields of the method's dataclass.

    Raises:
        UnknownMethodError: If no method has that name.
        DynCompressError: If the method has no such option, or not with such a value.

    Example:
        >>> get_method("dynet", g=6).macs([ConvSite("c", ConvSpec(8, 8, (3, 3)), 64)])[0].kernels
        3456
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise UnknownMethodError(
            f"no method {shown(name)}; known: {', '.join(list_methods())}{_nearest(name, _METHODS)}; a method of"
            " another package is known once the module that registers it is imported"
        )
    method: Any = _METHODS[name]
    allowed = _options(method)
    for option in options:
        if option not in allowed:
            raise DynCompressError(
                f"method {name!r} has no option {shown(option)}; its options: {', '.join(allowed) or 'none'}"
                f"{_nearest(option, allowed)}"
            )
    made: Method = method(**options)
    return made


def configured(name: str | None, options: Mapping[str, Any] | None) -> Method:
    """A method by its name and a mapping of its options; see `get_method`. None is `DEFAULT`.

    Raises:
        UnknownMethodError: If no method has that name.
        DynCompressError: If the options are no mapping, or not those of the method.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(option, str) for option in options):
        raise DynCompressError(f"options {shown(options)} are no mapping of names to values: give a dict, {{'g': 4}}")
    if name is None:
        _check_default(options)
    return get_method(DEFAULT if name is None else name, **options)


def _check_default(options: Mapping[str, Any]) -> None:
    """Raise where options without a method are not the default's: then another method was meant."""
    known = _options(_METHODS[DEFAULT])
    unknown = [option for option in options if option not in known]
    if not unknown:
        return
    able = [name for name in list_methods() if set(options) <= set(_options(_METHODS[name]))]
    example = "dynet" if "dynet" in able or not able else able[0]
    raise DynCompressError(
        f"options {shown(options)} are given without a method, and the default, {DEFAULT!r}, has no option"
        f" {shown(unknown[0])} (its options: {', '.join(known)}); name the method, such as method={example!r}"
        + (f"; methods with such options: {', '.join(able)}" if able else "")
    )


def _options(method: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]


def _nearest(word: object, words: Any) -> str:
    match = difflib.get_close_matches(str(word)[:100], words, n=1)
    return f"; did you mean {match[0]!r}?" if match else ": use one of those"
