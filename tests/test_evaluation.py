"""Measuring: the right number, and nothing changed by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyncompress import latency
from dyncompress.errors import DynCompressError
from dyncompress.evaluation import Latency, bank_bytes, evaluate, measure_latency, param_bytes
from dyncompress.latency import resize_batch
from dyncompress.layers import ConvSite, ConvSpec, DyNet

EYE = torch.eye(3)
ZEROS = torch.zeros(3, dtype=torch.long)


class Picks(nn.Module):
    """Logits are the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class PicksNamed(nn.Module):
    """Two inputs by keyword, an output with `.logits`."""

    def forward(self, *, pixels: Tensor, shift: Tensor) -> Any:
        return SimpleNamespace(logits=pixels + shift)


def test_accuracy_counts_images_and_not_batches() -> None:
    # 1 of 3 right, then 1 of 1: 2 of 4 images; the mean of the batches would be 0.67
    batches = [(EYE, ZEROS), (EYE[:1], ZEROS[:1])]
    assert evaluate(Picks(), batches) == 0.5


@pytest.mark.parametrize(
    "batch",
    [
        [EYE, ZEROS],
        ([EYE], ZEROS),
        {"image": EYE, "label": ZEROS},
        {"x": EYE, "labels": ZEROS},
    ],
)
def test_accuracy_from_every_kind_of_batch(batch: Any) -> None:
    assert evaluate(Picks(), [batch]) == pytest.approx(1 / 3)


def test_accuracy_of_keyword_inputs_and_an_output_object() -> None:
    shift = torch.tensor([[9.0, 0.0, 0.0]])  # all answers become class 0
    assert evaluate(PicksNamed(), [{"pixels": EYE, "shift": shift, "labels": ZEROS}]) == 1.0


def test_accuracy_of_dense_labels_counts_pixels() -> None:
    logits = torch.zeros(1, 2, 2, 2)  # [B, classes, H, W], all class 0
    assert evaluate(Picks(), [(logits, torch.tensor([[[0, 0], [0, 1]]]))]) == 0.75


def mixed_mode_net() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2))
    net.train()
    net[1].eval()  # a frozen BatchNorm inside a network in training
    return net


def test_measuring_leaves_the_network_and_the_seed_alone() -> None:
    net = mixed_mode_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 3, 3), torch.zeros(8).long()), 4, shuffle=True)
    example, seed = torch.randn(2, 1, 3, 3), torch.get_rng_state()
    evaluate(net, loader)
    measure_latency({"net": net}, example, rounds=5)
    assert [module.training for module in net] == [True, False, True, True, True]
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    net(torch.randn(2, 1, 3, 3)).sum().backward()  # nothing of inference mode is left in it


def test_flags_come_back_after_a_failure() -> None:
    net = mixed_mode_net()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        evaluate(net, [(torch.randn(2, 1, 5, 5), torch.zeros(2).long())])
    assert [module.training for module in net] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        (["text"], "yields str"),
        ([EYE], "yields Tensor"),
        ([(EYE, ZEROS, ZEROS)], "yields tuple"),
        ([(EYE, [0, 0, 0])], "tensor of labels"),
        ([{"image": EYE, "class": ZEROS}], r"yields dict with keys \['class', 'image'\]"),
        ([{"labels": ZEROS}], "beside the inputs"),
        ([(EYE, ZEROS[:2])], r"need integer class numbers of shape \(3,\)"),
        ([(EYE, ZEROS.float())], "labels are torch.float32"),
        ([(EYE, ZEROS + 3)], "labels run from 3 to 3 - the network tells classes 0 to 2 apart"),
        ([(EYE, ZEROS - 1)], "labels run from -1"),
        ([(EYE[:, :1], ZEROS)], r"gives Tensor of shape \(3, 1\)"),
    ],
)
def test_unusable_data_is_named(batches: Iterable[Any], message: str) -> None:
    with pytest.raises(DynCompressError, match=message):
        evaluate(Picks(), batches)


class Clock:
    """Stands in for the time module; networks move it forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.passes: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def network(self, name: str, seconds: Callable[[int], float]) -> nn.Module:
        clock = self

        class Timed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                clock.now += seconds(len(clock.passes))
                clock.passes.append(name)
                return x

        return Timed()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    yield made


def test_networks_take_turns_there_and_back(clock: Clock) -> None:
    nets = {name: clock.network(name, lambda _: 0.001) for name in "ABC"}
    measure_latency(nets, EYE, batch_sizes=(1,), rounds=5, warmup=0)
    assert "".join(clock.passes) == "ABCCBA" * 6  # one warm-up round in any case


def test_a_linear_drift_cancels(clock: Clock) -> None:
    # pass k takes (1 + k/4) times as long; in a round from pass k, A B B A:
    # A: 1 + k/4 + 1 + (k+3)/4, B: 2 (1 + (k+1)/4 + 1 + (k+2)/4) = twice that, in every round
    nets = {"A": clock.network("A", lambda k: 1 + k / 4), "B": clock.network("B", lambda k: 2 + k / 2)}
    found = measure_latency(nets, EYE, batch_sizes=(1,), rounds=5, warmup=1, budget_s=1e9)
    assert found["B"][1].ratio == pytest.approx(2)
    assert found["B"][1].iqr == pytest.approx(0)
    # rounds start at k = 4, 8, 12, 16, 20: A takes (2 + (2k + 3)/4) / 2 = 2.375, 3.375, 4.375, 5.375, 6.375 s
    assert found["A"][1].median_ms == pytest.approx(4375)
    assert found["A"][1].iqr == pytest.approx((5.375 - 3.375) / 4.375)
    assert found["A"][1].ratio == 1


def test_median_and_quartiles_of_the_ratios(clock: Clock) -> None:
    ratios = [9.0, 1.0, 1.1, 1.2, 1.3, 5.0]  # warm-up, then five rounds
    nets = {"A": clock.network("A", lambda _: 1), "B": clock.network("B", lambda k: ratios[k // 4])}
    found = measure_latency(nets, EYE, batch_sizes=(1,), rounds=5, warmup=1, budget_s=1e9)
    assert found["B"][1] == Latency(
        median_ms=pytest.approx(1200), ratio=pytest.approx(1.2), iqr=pytest.approx(1.3 - 1.1)
    )


def test_a_slow_network_ends_in_time(clock: Clock) -> None:
    measure_latency({"slow": clock.network("slow", lambda _: 60.0)}, EYE, batch_sizes=(1,), budget_s=5)
    assert len(clock.passes) == 2 * (1 + 5)  # one warm-up round, five timed ones


def test_a_budget_stops_between_five_and_all_rounds(clock: Clock) -> None:
    # a round takes 1 s; at 8 s the eighth is over and no ninth starts; the warm-up has 2 s for its 3 rounds
    measure_latency({"A": clock.network("A", lambda _: 0.5)}, EYE, batch_sizes=(1,), rounds=20, budget_s=8)
    assert len(clock.passes) == 2 * (2 + 8)


def test_every_batch_size_is_what_the_network_sees() -> None:
    seen = set()

    class Sees(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            seen.add((tuple(x.shape), tuple(scale.shape)))
            return x * scale

    example = {"x": torch.randn(3, 2), "scale": torch.ones(2)}
    found = measure_latency({"net": Sees()}, example, batch_sizes=(1, 8), rounds=5)
    assert seen == {((1, 2), (2,)), ((8, 2), (2,))}
    assert set(found["net"]) == {1, 8}
    assert all(0 < value.median_ms < 1000 for value in found["net"].values())


def test_threads_are_set_while_measuring_and_given_back() -> None:
    seen = set()

    class Sees(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((torch.get_num_threads(), self.training, torch.is_inference_mode_enabled()))
            return x

    before = torch.get_num_threads()
    measure_latency({"net": Sees()}, EYE, batch_sizes=(1,), rounds=5, threads=before + 1)
    assert seen == {(before + 1, False, True)}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nets": {}}, "cannot time 0 networks"),
        ({"batch_sizes": (0,)}, r"batch sizes \(0,\)"),
        ({"rounds": 4}, "5 rounds or more"),
        ({"example": 3.0}, r"the example \(float\) holds no batch"),
        ({"example": torch.zeros(0, 3)}, "holds no batch"),
        ({"nets": {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3, device="meta")}}, r"devices \(cpu, meta\)"),
    ],
)
def test_what_cannot_be_timed_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"nets": {"net": Picks()}, "example": EYE, "batch_sizes": (1,), "rounds": 5}
    arguments |= change
    with pytest.raises(DynCompressError, match=message):
        measure_latency(**arguments)


def test_batches_are_repeated_in_order_and_cut() -> None:
    assert resize_batch(torch.tensor([1, 2]), 5).tolist() == [1, 2, 1, 2, 1]
    x, name = resize_batch((torch.tensor([1, 2, 3]), "text"), 1)
    assert (x.tolist(), name) == ([1], "text")


def test_bytes_of_banks_and_parameters() -> None:
    spec = ConvSpec.of(nn.Conv2d(8, 16, 3, padding=1))
    (layer,) = DyNet(g=4, router="layer", placement="all").build([ConvSite("conv", spec, 64)])
    net = nn.Sequential(layer, nn.Conv2d(16, 2, 1))
    assert bank_bytes(net) == 16 * 4 * 8 * 3 * 3 * 4  # out * g * in * 3 * 3 floats of 4 bytes
    assert bank_bytes(net.half()) == 16 * 4 * 8 * 3 * 3 * 2
    assert bank_bytes(nn.Conv2d(8, 16, 3)) == 0


def test_a_shared_parameter_weighs_once() -> None:
    linear = nn.Linear(3, 3)
    assert param_bytes(nn.Sequential(linear, linear)) == (9 + 3) * 4
