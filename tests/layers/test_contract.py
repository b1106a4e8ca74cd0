"""Every registered method keeps the contract."""

from __future__ import annotations

import pytest

from dyncompress.layers import C2sp, CondConv, DyConv, DyNet, KernelWarehouse, Method, ODConv, get_method, list_methods
from tests.layers.contract import BLOCKS, CLAUSES, excused, keeps

METHODS = [
    *map(get_method, list_methods()),
    DyNet(g=3, router="layer"),
    DyNet(g=2, reduction=4),
    DyNet(g=2, router="layer", reduction=2),
    CondConv(experts=2),
    DyConv(kernels=3, reduction=2),
    ODConv(kernels=4),
    ODConv(kernels=2, spatial=False),
    ODConv(kernels=1, spatial=False),
    ODConv(kernels=1, spatial=False, router="block"),
    ODConv(kernels=2, router="block"),
    C2sp(g=2),
    KernelWarehouse(ratio=0.5),
    KernelWarehouse(ratio=2, cell=0.5),
    KernelWarehouse(ratio=0.5, basis=0.5, cell_in=1),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("clause", CLAUSES)
def test_a_method_keeps_the_contract(clause: str, block: str, method: Method) -> None:
    if reason := excused(method, clause):
        pytest.skip(reason)
    keeps(method, clause, block)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_method_is_excused_from_is_a_clause(method: Method) -> None:
    assert set(getattr(method, "exceptions", {})) <= set(CLAUSES)
