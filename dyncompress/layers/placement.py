"""Where kernels that are mixed for each image pay: one rule for all methods that have a bank of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dyncompress.layers.method import Method
from dyncompress.layers.options import check_choice
from dyncompress.layers.spec import ConvSite
from dyncompress.layers.static import Static

__all__ = ["affordable", "better_static", "check_placement", "pays", "placed"]

# placement="auto": where mixing g kernels takes more than a fifth of the convolution's time, there are fewer. An output
# position is one multiply-add per weight, and mixing reads each weight of g kernels once. Two CPUs, one thread, have 25
# to 80 GMAC/s and read 8 to 30 GB/s: that is the time of 11 g positions, and of 3 g where the bank stays in the cache.
_POSITIONS_PER_KERNEL, _POSITIONS_PER_CACHED_KERNEL = 56, 16
_CACHED_BYTES = 512 << 10  # of a bank at the original width, of which a quarter is left at a third of the MACs
# Below this a convolution is over before its kernel could be mixed: the calls alone take 15 to 30 us.
_TINY = 50_000  # multiply-adds
_BYTES = 4  # of a weight


def check_placement(placement: object) -> None:
    """Raise unless an option ``placement`` is one that methods know."""
    check_choice("placement", placement, ("auto", "all"))


def better_static(site: ConvSite) -> str:
    """Why a convolution is over before its kernel could be mixed; empty where it is not."""
    weights, positions = site.spec.kernel_params, site.positions
    if site.spec.is_depthwise:
        return f"static: depthwise, {weights:,} weights; mixing them takes longer than convolving"
    if weights * positions < _TINY:
        return f"static: tiny, {weights * positions:,} multiply-adds; mixing takes longer than convolving"
    return ""


def affordable(count: int, site: ConvSite) -> tuple[int, str]:
    """How many of so many kernels can be mixed within a fifth of the convolution's time, and why not all.

    The number halves until there are 16 output positions per kernel, or 56 where the bank is too large for the cache;
    0 stands for less than two.

    Example:
        >>> from dyncompress.layers import ConvSpec
        >>> affordable(4, ConvSite("c", ConvSpec(256, 256, (3, 3)), positions=196))[0]
        2
    """
    size, streamed, needed = _cost(count, site)
    fewer = count
    while fewer > 1 and fewer * needed > site.positions:
        fewer //= 2
    if fewer == count:
        return count, ""
    share = 100 * count * needed / (5 * site.positions)
    return fewer if fewer > 1 else 0, (
        f"mixing {size / 1e6:.1f} MB of kernels, {'from memory' if streamed else 'cached'}, takes {share:.0f} %"
        f" of the conv ({site.positions} positions), above 20 %"
    )


def pays(count: int, site: ConvSite) -> bool:
    """Whether so many kernels can be mixed within a fifth of the convolution's time; one can be worth mixing, too."""
    return count * _cost(count, site)[2] <= site.positions


def _cost(count: int, site: ConvSite) -> tuple[int, bool, int]:
    """Bytes of so many kernels, whether they are read from memory, and positions that pay for one."""
    size = count * site.spec.kernel_params * _BYTES
    streamed = size > _CACHED_BYTES
    return size, streamed, _POSITIONS_PER_KERNEL if streamed else _POSITIONS_PER_CACHED_KERNEL


def placed(method: Any, option: str, site: ConvSite) -> tuple[Method, str]:
    """A method with a bank on a site, with fewer kernels or not at all where measured cost says that it does not pay.

    Args:
        method: Has options ``placement`` and the named one.
        option: Its number of kernels.
        site: Where it is to be.

    Returns:
        What :meth:`Method.place` does.
    """
    count = getattr(method, option)
    if count < 2:
        return Static(), f"static: a bank of {count} kernel has nothing to mix"
    if method.placement == "all":
        return method, ""
    if reason := better_static(site):
        return Static(), reason
    fewer, why = affordable(count, site)
    if fewer == count:
        return method, ""
    if not fewer:
        return Static(), f"static: {why}"
    return replace(method, **{option: fewer}), f"{option} {count} -> {fewer}: {why}"
