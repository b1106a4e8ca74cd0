"""What every method owes, as functions that raise AssertionError: one per clause, for any method and any layers.

    keeps(method, "samples_do_not_mix", "2d")

A method that cannot keep a clause says so in its class attribute ``exceptions``, {clause: reason}.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyncompress.layers import ConvSite, ConvSpec, DynamicConv, Method, Static, load_static

Check = Callable[[Method, list[ConvSite]], None]

CLAUSES: dict[str, Check] = {}
# Layers that follow each other, as in a block; the last of each changes the size, the channels or both.
BLOCKS = {
    "2d": [
        ConvSpec(6, 8, (3, 3), padding=(1, 1)),
        ConvSpec(8, 8, (3, 3), padding=(1, 1), bias=False),
        ConvSpec(8, 4, (3, 3), stride=(2, 2), padding=(1, 1)),
    ],
    "bottleneck": [
        ConvSpec(16, 4, (1, 1), bias=False),
        ConvSpec(4, 4, (3, 5), padding="same", dilation=(1, 2), padding_mode="reflect"),
        ConvSpec(4, 16, (1, 1)),
    ],
    "grouped": [
        ConvSpec(8, 12, (3, 3), padding=(1, 1), groups=4),
        ConvSpec(12, 12, (5, 3), stride=(1, 2), padding=(2, 1), groups=12, padding_mode="circular"),
    ],
    "1d": [
        ConvSpec(4, 6, (3,), padding=(2,), dilation=(2,), padding_mode="replicate"),
        ConvSpec(6, 4, (2,), stride=(2,), padding="valid"),
    ],
    "3d": [
        ConvSpec(2, 4, (3, 3, 3), padding="same"),
        ConvSpec(4, 2, (1, 3, 3), (1, 2, 1), (0, 1, 1), groups=2),
    ],
    "alone": [ConvSpec(6, 10, (1, 1))],
}
SIZES = {1: (9,), 2: (8, 9), 3: (4, 5, 6)}


def clause(check: Check) -> Check:
    """Make a check a clause of the contract, under its name."""
    CLAUSES[check.__name__] = check
    return check


def excused(method: Method, name: str) -> str:
    """Why a method need not keep a clause; empty where it has to."""
    return getattr(method, "exceptions", {}).get(name, "")


def keeps(method: Method, name: str, block: str) -> None:
    """Raise AssertionError unless a method keeps a clause on the layers of a block."""
    CLAUSES[name](method, sites_of(BLOCKS[block]))


def sites_of(specs: Sequence[ConvSpec]) -> list[ConvSite]:
    assert all(a.out_channels == b.in_channels for a, b in pairwise(specs))
    sites, size = [], SIZES[specs[0].ndim]
    for index, spec in enumerate(specs):
        size = spec.output_size(size)
        sites.append(ConvSite(f"conv{index}", spec, positions=torch.Size(size).numel()))
    return sites


def build(method: Method, sites: list[ConvSite]) -> nn.Sequential:
    """The layers in execution order, none of whose parameters is zero or neutral any more."""
    sets = [[site] for site in sites] if method.sharing == "layer" else [sites]
    net = nn.Sequential(*(layer for together in sets for layer in method.build(together)))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    for layer in net:
        if isinstance(layer, DynamicConv):
            layer.anneal(1.0)  # as after its schedule, during which some parameters wait
    return net


def images(sites: list[ConvSite], batch: int = 3) -> Tensor:
    spec = sites[0].spec
    return torch.randn(batch, spec.in_channels, *SIZES[spec.ndim])


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@clause
def output_shape(method: Method, sites: list[ConvSite]) -> None:
    net, static = build(method, sites), build(Static(), sites)
    for batch in (0, 1, 3):
        x = images(sites, batch)
        assert net(x).shape == static(x).shape


@clause
def every_parameter_learns(method: Method, sites: list[ConvSite]) -> None:
    net = build(method, sites)
    net(images(sites, batch=1)).square().sum().backward()  # a batch of one, as for training with little memory
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@clause
def warm_start_is_the_static_network(method: Method, sites: list[ConvSite]) -> None:
    net, static = build(method, sites), build(Static(), sites)
    for layer, conv, site in zip(net, static, sites, strict=True):
        spare = torch.randn(site.spec.out_channels, *site.spec.weight_shape[1:])
        load_static(layer, conv.weight, conv.bias, spare=spare)
    for x in (images(sites), 100 * images(sites, 1), torch.zeros_like(images(sites))):
        assert_same(net(x), static(x))


@clause
def samples_do_not_mix(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites, 4)
    assert_same(net(x), torch.cat([net(sample) for sample in x.split(1)]))


@clause
def macs_are_what_torch_counts(method: Method, sites: list[ConvSite]) -> None:
    net = build(method, sites)
    with FlopCounterMode(display=False) as counter:
        net(images(sites, batch=1))
    counted = [sum(counter.get_flop_counts()[f"Sequential.{i}"].values()) // 2 for i in range(len(sites))]
    sets = [[site] for site in sites] if method.sharing == "layer" else [sites]
    assert counted == [macs.total for together in sets for macs in method.macs(together)]


@clause
def params_are_what_torch_holds(method: Method, sites: list[ConvSite]) -> None:
    counted = [sum(p.numel() for p in layer.parameters()) for layer in method.build(sites)]
    assert counted == method.params(sites)


@clause
def state_dict_is_the_layer(method: Method, sites: list[ConvSite]) -> None:
    net, other, x = build(method, sites), build(method, sites), images(sites)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


@clause
def copies_are_independent(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites)
    net(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)]
    expected = net(x)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(other(x), expected) for other in copies)


@clause
def moves_between_dtypes(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites)
    expected = net(x)
    assert_same(net.double()(x.double()).float(), expected)
    result = net.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    # bf16 keeps 8 bits: every layer adds errors of some 2^-8 of the typical value.
    assert (result.float() - expected).abs().max() < 0.05 * expected.abs().max()


@clause
def moves_between_devices(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites)
    expected = net(x)
    saved = net.state_dict()
    assert net.to("meta")(x.to("meta")).shape == expected.shape
    net.to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(net(x), expected)


@clause
def runs_channels_last(method: Method, sites: list[ConvSite]) -> None:
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(sites[0].spec.ndim, torch.contiguous_format)
    net, x = build(method, sites), images(sites)
    expected = net(x)
    assert_same(net.to(memory_format=layout)(x.to(memory_format=layout)), expected)


@clause
def train_and_eval_agree(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites)
    expected = net.train()(x)
    assert torch.equal(net.eval()(x), expected)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert torch.equal(net(x), expected)


@clause
def runs_under_autocast(method: Method, sites: list[ConvSite]) -> None:
    net, x = build(method, sites), images(sites)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = net(x)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() < 0.05 * expected.abs().max()


@clause
def exports_with_any_batch(method: Method, sites: list[ConvSite]) -> None:
    net = build(method, sites).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (images(sites, 4),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3, 4, 7):
        x = images(sites, size)
        assert_same(exported(x), net(x))


@clause
def repr_names_the_method(method: Method, sites: list[ConvSite]) -> None:
    assert all(method.name in repr(layer) for layer in method.build(sites))
