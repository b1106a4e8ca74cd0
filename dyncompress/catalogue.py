"""The presets as a table: which network of which paper a name stands for, and what the paper says that it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyncompress.layers import get_method
from dyncompress.presets import FORMS, Preset, Published

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["preset_table"]


def preset_table(presets: Sequence[Preset]) -> Table:
    """Presets by the network that they need, with the rows of their papers' tables; fits 120 columns.

    Args:
        presets: Those of :func:`dyncompress.presets.list_presets`, say.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("preset", "applies to", "in the paper"):
        table.add_column(heading, no_wrap=heading == "preset")
    for heading in ("params", "MACs", "arXiv"):
        table.add_column(heading, justify="right", no_wrap=True)
    for preset in presets:
        form = FORMS[preset.form][0].partition(" (")[0].partition(" ")[2]  # without article and explanation
        first = [preset.name, form]
        for row in preset.published or (Published("-", None, None),):
            table.add_row(*first, row.network, _millions(row.params), _millions(row.macs), _number(preset))
            first = ["", ""]
    return table


def _millions(value: float | None) -> str:
    return "-" if value is None else f"{value:,g} M"


def _number(preset: Preset) -> str:
    """The paper's, which is all of it that a column has room for."""
    return get_method(preset.method).paper.rpartition("arXiv ")[2]
