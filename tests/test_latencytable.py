from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyncompress import latencytable
from dyncompress.errors import PlanError
from dyncompress.latencytable import (
    Device,
    LatencyTable,
    Layers,
    Run,
    Timed,
    against_reference,
    cache_folder,
    callables,
    in_inference_form,
)
from dyncompress.layers import ConvSite, ConvSpec, DyNet, Static

NARROW = Layers(Static(), (Run(ConvSpec(8, 8, (3, 3), padding=(1, 1)), (8, 8)),))
WIDE = Layers(Static(), (Run(ConvSpec(64, 64, (3, 3), padding=(1, 1)), (28, 28)),))
BLOCK = Layers(DyNet(), (Run(ConvSpec(8, 16, (3, 3)), (8, 8)), Run(ConvSpec(16, 8, (1, 1)), (6, 6))))


class Counted:
    """A timer that says 1, 2, 3 ... and remembers how many callables it got each time."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, runs, device) -> Timed:
        self.calls.append(len(runs))
        return Timed([float(i + 1) for i in range(len(runs))], 0.25)


def test_what_is_missing_is_measured_once_with_all_that_run_beside_it(tmp_path):
    timed = Counted()
    table = LatencyTable(folder=tmp_path, timed=timed)
    assert table.times([NARROW, WIDE]) == [1.0, 2.0]
    assert table.times([WIDE, WIDE, NARROW]) == [2.0, 2.0, 1.0] and timed.calls == [2]
    # the new one runs in its place; those that are known run too, and keep their times; its two runs have one entry
    assert table.times([BLOCK, NARROW, BLOCK]) == [2.0, 1.0, 2.0] and timed.calls == [2, 3]


def test_a_busy_machine_is_measured_again_and_then_refused(tmp_path):
    shares = iter([0.5, 0.95, 0.4, 0.6, 0.89])

    def timed(runs, device):
        return Timed([1.0] * len(runs), 1e-4, running=next(shares))

    table = LatencyTable(folder=tmp_path, timed=timed)
    assert table.times([NARROW]) == [1.0]  # the second time it was quiet
    with pytest.raises(PlanError, match=r"busy: .* ran 89% of the time .* wait until .* --threads 1"):
        table.times([NARROW, WIDE])
    assert list(LatencyTable(folder=tmp_path).ratios) == [str(NARROW)]


@pytest.mark.parametrize(("threads", "told"), [(2, True), (1, False)])
def test_a_thread_that_does_not_run_all_the_time_shows_where_other_work_changes_its_times(threads, told):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        running = against_reference([lambda: time.sleep(0.02)], Device.here(), seconds=0.1).running
    finally:
        torch.set_num_threads(before)
    assert running < 0.9 if told else running == 1.0


def test_the_file_is_read_by_the_next_table_of_this_device_and_by_no_other(tmp_path):
    LatencyTable(folder=tmp_path, timed=Counted()).times([NARROW, WIDE])
    timed = Counted()
    again = LatencyTable(folder=tmp_path, timed=timed)
    assert again.times([WIDE, NARROW]) == [2.0, 1.0] and again.reference == 0.25 and not timed.calls
    other = LatencyTable(replace(Device.here(), threads=64), tmp_path)
    assert not other.ratios and other.path != again.path
    with pytest.raises(PlanError, match=r"of .*64 threads.*lacks 1 layers, 'static\(\): 8 -> 8.* among them; this is"):
        other.times([NARROW])


def test_two_tables_of_one_device_keep_what_the_other_has_written(tmp_path):
    one, two = (LatencyTable(folder=tmp_path, timed=Counted()) for _ in range(2))
    one.times([NARROW])
    two.times([WIDE])
    assert set(LatencyTable(folder=tmp_path).ratios) == {str(NARROW), str(WIDE)}


def test_an_entry_says_what_it_is_of():
    assert str(NARROW) == "static(): 8 -> 8, 3x3, padding 1 at 8x8"
    assert str(BLOCK).startswith("dynet(g=4, router=block, ")  # and its other options
    assert str(BLOCK).endswith("): 8 -> 16, 3x3 at 8x8 + 16 -> 8, 1x1 at 6x6")
    assert str(Run(ConvSpec(8, 8, (3,)), (16,), images=4)) == "8 -> 8, 3 at 4 of 16"
    device = Device.here(dtype=torch.float64, batch=8)
    assert (device.device, device.dtype, device.batch) == ("cpu", "float64", 8)
    assert (
        str(replace(device, hardware="M", threads=1, torch_version="2"))
        == "M, cpu, 1 thread, float64, batch 8, torch 2"
    )


def edited(change):
    def damage(path: Path) -> None:
        data = json.loads(path.read_text("utf-8"))
        change(data)
        path.write_text(json.dumps(data), "utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_text("{", "utf-8"), "Expecting"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "decode"),
        (lambda path: path.write_text("[" * 100_000, "utf-8"), "recursion"),
        (edited(lambda data: data.pop("layers")), "lacks 'layers'"),
        (edited(lambda data: data.update(schema=99)), "schema is 99, this version writes 2"),
        (edited(lambda data: data["device"].update(threads=64)), "is of .*64 threads.*and this is"),
        (edited(lambda data: data["layers"].update({str(NARROW): "1"})), "it takes a number"),
        (edited(lambda data: data["layers"].update({str(NARROW): -1.0})), r"8 -> 8.*is -1.0; a time is positive"),
        (edited(lambda data: data.update(reference=float("nan"))), "reference.*is nan; a time is positive"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_device_is_refused_with_the_reason(tmp_path, damage, reason):
    table = LatencyTable(folder=tmp_path, timed=Counted())
    table.times([NARROW])
    damage(table.path)
    with pytest.raises(PlanError, match=rf"(?s)table at '.*json' can't be read \(.*{reason}.*\); delete it"):
        LatencyTable(folder=tmp_path)


def test_layers_that_run_in_another_way_have_another_file_in_the_cache(monkeypatch):
    before = LatencyTable().path
    assert LatencyTable().path == before
    monkeypatch.setattr("dyncompress.latencytable.SCHEMA", 99)
    assert LatencyTable().path.parent == before.parent and LatencyTable().path != before


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dyncompress" and LatencyTable().path.parent == tmp_path / "dyncompress"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/dyncompress"


class FakeClock:
    """A clock that only the work moves, on a machine that becomes twice as slow."""

    def __init__(self) -> None:
        self.now, self.speed = 0.0, 1.0

    def thread_time(self) -> float:
        return self.now

    perf_counter = thread_time

    def work(self, seconds: float):
        def run() -> None:
            self.now += seconds * self.speed

        return run


def test_ratios_are_those_of_the_fast_rounds(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(latencytable, "time", clock)
    monkeypatch.setattr(latencytable, "reference", lambda device: clock.work(0.5))
    rounds = 0

    def last() -> None:
        nonlocal rounds
        rounds += 1
        clock.now += 1.0 * clock.speed
        clock.speed = 3.0 if rounds >= 12 else 1.0  # more than half of the rounds meet other work on the machine

    found = against_reference([clock.work(2.0), last], Device.here(), seconds=0)
    assert found.ratios == [4.0, 2.0] and found.reference == 0.5
    assert len(found.rounds) == 25 and rounds == 26  # one for warming up
    assert found.rounds[0] == [4.0, 2.0] == found.rounds[-1]  # in one round all are as fast, or slow


def test_layers_run_as_they_are_shipped_on_inputs_of_their_own_size():
    modules = in_inference_form(BLOCK)
    assert not any(module.training for module in modules)
    as_built = BLOCK.method.build([ConvSite("a", BLOCK.runs[0].spec, 36), ConvSite("b", BLOCK.runs[1].spec, 36)])
    assert {type(m) for m in modules} == {type(m) for m in type(as_built[0]).shipped(as_built)}
    runs = callables([NARROW, BLOCK], replace(Device.here(), batch=2))
    state = torch.get_rng_state()
    with torch.inference_mode():
        for run in runs:
            run()
    assert torch.equal(state, torch.get_rng_state())


def test_the_clock_tells_a_large_layer_from_a_small_one(tmp_path):
    """A real measurement: 64 -> 64 on 28x28 is the reference itself, and has 784 times the MACs of 8 -> 8 on 8x8."""
    wide, narrow = LatencyTable(folder=tmp_path).times([WIDE, NARROW])
    assert 0.5 < wide < 2
    assert narrow < wide / 3
