"""torch-pruning's choice of channels as a plan of ours, so that its student is trained exactly as the others are.

    python -m benchmarks.accuracy.pruned PLAN.json TARGET RANKING RECIPE.yaml [--KEY VALUE ...]

RANKING is ``magnitude`` or ``taylor`` (first-order, on training batches), of all layers together; pruning ratios are
searched until the MACs land. The kept channels are read off a copy whose weights are numbered and pruned alike.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.operators  # noqa: F401 - before anything imports torchvision, as Lightning does where it is there
from benchmarks import peer
from dyncompress.conversion import convert
from dyncompress.errors import DynCompressError, PlanError
from dyncompress.graph import ConvGraph, extent, parameter_shapes
from dyncompress.narrowing import Runs
from dyncompress.plan import Plan
from dyncompress.planfile import Keep
from dyncompress.planning import make_plan
from dyncompress.recipe import importable, read_recipe
from dyncompress.subject import Subject
from dyncompress.taylor import Loss, cross_entropy

RANKINGS = ("magnitude", "taylor")


def as_plan(net: nn.Module, example: Tensor, pruned: peer.Pruned) -> Plan:
    """The plan that keeps the channels which a pruned network kept.

    Args:
        net: The original.
        example: What it takes.
        pruned: What torch-pruning made of it.

    Raises:
        PlanError: If no plan has the shapes of this network.
    """
    near = make_plan(net, example, pruned.reached, method="static")
    found = _kept(near.graph, _places(net, example, pruned))
    keep = tuple(found.get(g, group.channels) for g, group in enumerate(near.graph.groups))
    emptied = [group.name for group, kept in zip(near.graph.groups, keep, strict=True) if not kept]
    if emptied:
        raise PlanError(f"torch-pruning leaves no channel of {', '.join(emptied)}")
    plan = replace(near, keep=keep, target=f"{pruned.reached:.2%}", allocation="edited")
    ours, theirs = parameter_shapes(convert(net, plan)), parameter_shapes(pruned.network)
    odd = [f"{name} {ours.get(name)} > {shape}" for name, shape in theirs.items() if ours.get(name) != shape]
    if odd:
        raise PlanError(f"torch-pruning's network has other shapes than a plan's: {odd[0]}")
    return plan


def _kept(graph: ConvGraph, places: Mapping[str, Sequence[set[int]]]) -> dict[int, Keep]:
    """What every width group keeps.

    Where a shortcut pads channels on both sides, torch-pruning pairs the first channels of the wider side with those of
    the narrower one, whatever the padding: it would add channels to others than before. There the channels of the
    narrower side count, and on the wider side the number of those that are left; which of them, magnitude decides.
    """
    keys = ((key.rpartition(":"), runs) for key, runs in graph.axes.items())
    axes = [(runs, places[name][int(dim)]) for (name, _, dim), runs in keys if name in places]  # no buffers
    found: dict[int, Keep] = {}
    for runs, stay in axes:
        said = _said(runs, stay)
        if len(said) == 1 == len({group for group, *_ in runs}):
            ((group, channels),) = said.items()
            if found.setdefault(group, channels) != channels:
                raise PlanError(f"torch-pruning parts the channels of {graph.groups[group].name} in its layers")
    for runs, stay in axes:
        said = _said(runs, stay)
        new = [group for group in said if group not in found]
        if all(found[group] == channels for group, channels in said.items() if group in found):
            found |= {group: said[group] for group in new}
        elif len(new) == 1:
            fixed, parts = extent(runs)
            each = dict(parts)
            known = sum(_size(found[group]) * each[group] for group in said if group in found)
            found[new[0]] = (len(stay) - fixed - known) // each[new[0]]
        elif new:
            raise PlanError(f"torch-pruning parts channels of {', '.join(graph.groups[g].name for g in said)}")
    return found


def _said(runs: Runs, stay: set[int]) -> dict[int, tuple[int, ...]]:
    """The channels of each group that are kept on one axis."""
    kept: dict[int, set[int]] = defaultdict(set)
    at = 0
    for group, start, count, repeat in runs:
        if group >= 0:
            kept[group] |= {start + (p - at) // repeat for p in range(at, at + count * repeat) if p in stay}
        at += count * repeat
    return {group: tuple(sorted(channels)) for group, channels in kept.items()}


def _size(kept: Keep) -> int:
    return kept if isinstance(kept, int) else len(kept)


def _places(net: nn.Module, example: Tensor, pruned: peer.Pruned) -> dict[str, list[set[int]]]:
    """Per parameter and dimension, the positions of the original that were kept."""
    import torch_pruning

    numbered = deepcopy(net).eval().double().requires_grad_(True)  # whole numbers are exact up to 2**53
    graph = torch_pruning.DependencyGraph().build_dependency(numbered, example.double())
    shapes = {name: tensor.shape for name, tensor in numbered.named_parameters()}
    with torch.no_grad():
        for tensor in numbered.parameters():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    graph.load_pruning_history(pruned.history)
    found = {}
    for name, tensor in numbered.named_parameters():
        places = torch.unravel_index(tensor.detach().flatten().long(), shapes[name])
        found[name] = [set(each.tolist()) for each in places]
    return found


def importance(ranking: str, batches: Iterable[Any], loss: Loss = cross_entropy) -> peer.Importance:
    """One of torch-pruning's.

    Args:
        ranking: One of `RANKINGS`.
        batches: For taylor: gradients of the loss are added up over them.
        loss: Likewise.
    """
    if ranking == "magnitude":
        return peer.magnitude

    def of_gradients(net: nn.Module) -> Any:
        import torch_pruning

        net.zero_grad()
        for batch in batches:
            loss(net, batch).backward()
        return torch_pruning.importance.TaylorImportance()

    return of_gradients


def main(words: list[str]) -> int:
    """Write the plan; the exit status is 2 where there is none, and what is wrong is told."""
    path, target, ranking, *rest = words
    try:
        recipe = read_recipe([*rest, "--target", target, "--method", "static", "--control", "false"])
        subject = Subject.of(recipe)
        with importable(recipe.folder):
            net = subject.network(subject.model).eval()
            example = subject.example[0][:1].clone()  # what inference mode made takes no gradients
            rank = importance(ranking, subject.batches(recipe.batches) if ranking == "taylor" else [])
            pruned = peer.search(net, example, float(target.rstrip("%")) / 100, True, rank)
            as_plan(net, example, pruned).save(Path(path))
    except DynCompressError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
