"""The tables of docs/presets.md: ``PYTHONPATH=.:tests python -m papers.table``."""

from __future__ import annotations

from collections.abc import Iterator

from dyncompress.presets import Published, find_preset, list_presets
from papers.counting import AS_IN_THE_PAPER, convolutions, everything, operations, params, plan

# Networks that the paper has no row for: they are counted, and there is nothing to compare them with.
UNPUBLISHED = dict.fromkeys(("dcd-convnextt", "odconv-convnextt-1x", "odconv-convnextt-4x"), "ConvNeXt-T")
COUNTED = {"dynet": convolutions, "odconv": operations, "dyconv": everything}


def lines() -> Iterator[str]:
    """One row per network that a paper gives numbers for, or that is none of a paper's."""
    for preset in list_presets():
        if preset.method in COUNTED or preset.name.startswith("dcd"):
            ours = UNPUBLISHED.get(preset.name)
            for row in (Published(ours, None, None),) if ours is not None else preset.published:
                yield _line(preset.name, row)


def _line(name: str, row: Published) -> str:
    preset = find_preset(name)
    network = AS_IN_THE_PAPER[preset.method].get(row.network, row.network)
    found = plan(name, network)
    cells = [f"`{name}`", network, *_compared(row.params, params(found), 2)]
    cells += _compared(row.macs, COUNTED.get(preset.method, everything)(found), 1)
    return f"| {' | '.join([*cells, f'{everything(found):.1f}'])} |"


def _compared(published: float | None, counted: float, digits: int) -> list[str]:
    off = "" if published is None else f" ({100 * (counted / published - 1):+.2f} %)"
    return ["" if published is None else f"{published:g}", f"{counted:.{digits}f}{off}"]


if __name__ == "__main__":
    print("\n".join(lines()))
