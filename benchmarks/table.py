"""docs/zoo.md from the results of the zoo: a page is a pure function of the JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dyncompress.budget import readable

PAGE = Path(__file__).parents[1] / "docs/zoo.md"
_SOURCES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "smp": "segmentation_models_pytorch",
    "transformers": "transformers",
    "hand": "hand-made, one per cause",
}
_INTRODUCTION = """\
# Does it work on mine?

`make zoo` asks {networks} networks for 50 % and for 25 % of their MACs with `method="dynet"`, and checks what
comes back. A network **works** where plan and conversion go through, the student's output has the same structure and
shapes, the backward pass reaches every parameter that it reached before, the state dict restores the student in a fresh
network, the student starts at the narrowed network (1e-4), and, where BatchNorm is the only norm, cutting equals
zeroing what reads the cut channels (1e-4). It **lands** where torch counts MACs within 1 % of the target. Where a
target is out of reach, the nearest one in reach is converted and checked instead.
"""
_WORKS = ("ok", "missed")
_KEPT = 180  # characters of a reason


def render(results: dict[str, Any]) -> str:
    """The page.

    Args:
        results: As `benchmarks.zoo` writes them.

    Returns:
        Markdown.
    """
    rows = list(results["ours"].values())
    return "\n".join([*_head(results, rows), *_networks(rows, results["peer"]), *_notes(rows)]) + "\n"


def _head(results: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _INTRODUCTION.format(networks=len(rows))
    yield "| networks | | work | land at 50 % | land at 25 % | torch-pruning lands at 50 % |"
    yield "|---|--:|--:|--:|--:|--:|"
    for source, title in [*_SOURCES.items(), ("", "**all**")]:
        ours = [row for row in rows if row["name"].startswith(f"{source}/" if source else "")]
        if ours:
            peers = [results["peer"][row["name"]] for row in ours if row["name"] in results["peer"]]
            yield (
                f"| {title} | {len(ours)} | {_share(map(_works, ours))} | {_share(_landed(row, '50') for row in ours)}"
                f" | {_share(_landed(row, '25') for row in ours)} | {_share(_landed(row, '50') for row in peers)} |"
            )
    yield ""
    yield from _figures(rows, results["peer"])
    yield ""
    yield from _provenance(results["provenance"])
    yield ""


def _figures(rows: list[dict[str, Any]], peer: dict[str, Any]) -> Iterator[str]:
    seconds = sorted(f["cpu"] for row in rows for f in row["targets"].values() if "cpu" in f)
    if seconds:
        late = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        line = "- Plan and conversion, graph included, on one thread, in seconds of CPU: median"
        line += f" {statistics.median(seconds):.1f} s, 95th percentile {late:.1f} s, slowest {seconds[-1]:.1f} s"
        known = next((row for row in rows if row["name"] == "timm/resnet50"), {"targets": {}})["targets"].get("50", {})
        yield line + (f"; ResNet-50 {known['cpu']:.1f} s." if "cpu" in known else ".")
    for target in ("50", "25"):
        found = Counter(_status(row, target) for row in rows)
        yield f"- At {target} %: {', '.join(f'{count} {status}' for status, count in found.most_common())}."
    tried = [z for row in rows if "distance" in (z := row.get("zeroing", {})) and not z["wrong"].startswith("n/a")]
    held = [found["distance"] for found in tried if not found["wrong"]]
    yield (
        f"- Zeroing equivalence holds on {len(held)} of the {len(tried)} networks where it proves something; largest"
        f" distance there {max(held, default=0):.0e}."
    )
    if peer:
        found = Counter(_status(row, "50") for row in peer.values())
        counts = ", ".join(f"{count} {status}" for status, count in found.most_common())
        yield (
            f"- torch-pruning at 50 %: {counts}. It is told which layers write the output and tries up to ten pruning"
            " ratios, uniform, then ranked globally; its output's structure, shapes and backward pass are checked."
        )


def _provenance(arms: dict[str, Any]) -> Iterator[str]:
    for arm, title in (("ours", "dyncompress"), ("peer", "torch-pruning")):
        if arm in arms:
            here = arms[arm]
            versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
            yield (
                f"{title}: `make zoo`, {here['date'][:10]}, {here['hardware']}, one thread a network, {here['jobs']} at"
                f" a time, limit {here['limit']:g} s a network; {versions}. {here.get('note', '')}".rstrip()
            )
            yield ""
    yield "Weights are random, inputs those of [`benchmarks/networks`](../benchmarks/networks)."


def _networks(rows: Iterable[dict[str, Any]], peer: dict[str, Any]) -> Iterator[str]:
    yield "## Network by network"
    yield ""
    yield "Share of the MACs that is left (asked 50 %, 25 %), and seconds of CPU from network to student."
    yield ""
    yield "| network | MACs | at 50 % | at 25 % | s | torch-pruning at 50 % |"
    yield "|---|--:|--:|--:|--:|--:|"
    for row in rows:
        seconds = row["targets"].get("50", {}).get("cpu")
        cells = [
            row["name"],
            readable(row["macs"]) if "macs" in row else "",
            _cell(row, "50"),
            _cell(row, "25"),
            "" if seconds is None else f"{seconds:.1f}",
            _cell(peer.get(row["name"]), "50"),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    for status, title in (
        ("missed", "Out of reach, with the range that is in reach"),
        ("refused", "Refused, left untouched"),
        ("wrong", "Wrong"),
        ("crash", "Crashed"),
        ("hang", "Over the time limit"),
        ("not built", "Not built"),
    ):
        lines = list(_reasons(rows, status))
        if lines:
            yield from (f"## {title}", "", *lines, "")


def _reasons(rows: list[dict[str, Any]], status: str) -> Iterator[str]:
    for row in rows:
        said: dict[str, list[str]] = {}
        for target in ("50", "25"):
            if _status(row, target) == status:
                said.setdefault(_why(row, target), []).append(f"{target} %")
        yield from (f"- {row['name']}, {' and '.join(targets)}: {why}" for why, targets in said.items())


def _why(row: dict[str, Any], target: str) -> str:
    found = row["targets"].get(target, {})
    if "range" in found and found["status"] == "missed":
        low, high = found["range"]
        pinned = row.get("pinned", {"count": 0, "first": {}})
        kept = "; ".join(f"{name}: {_text(reason, 100)}" for name, reason in list(pinned["first"].items())[:2])
        reach = f"{low:.1%} to {high:.1%} (reached {found['reached']:.1%})"
        return f"{reach}; {pinned['count']} layers keep their width: {kept}"
    return _text(found.get("reason") or row.get("error", ""), _KEPT)


def _text(words: str, length: int) -> str:
    flat = " ".join(words.split()).replace("|", "\\|")
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def _status(row: dict[str, Any], target: str) -> str:
    return "not built" if "error" in row else str(row["targets"].get(target, {}).get("status", "not tried"))


def _works(row: dict[str, Any]) -> bool:
    return all(_status(row, target) in _WORKS for target in ("50", "25")) and not row.get("touched")


def _landed(row: dict[str, Any], target: str) -> bool:
    return _status(row, target) == "ok"


def _share(answers: Iterable[bool]) -> str:
    known = list(answers)
    return f"{sum(known)} ({sum(known) / len(known):.0%})" if known else ""


def _cell(row: dict[str, Any] | None, target: str) -> str:
    if row is None:
        return ""
    status = _status(row, target)
    reached = row["targets"].get(target, {}).get("reached")
    if status == "ok":
        return f"{reached:.1%}"
    return status if reached is None else f"{status}, {reached:.1%}"


if __name__ == "__main__":
    from benchmarks.zoo import RESULTS, read

    PAGE.write_text(render(read(RESULTS)), "utf-8")
