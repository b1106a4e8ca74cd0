"""The zoo's runner on small networks, in its own environment, and on networks that hang and die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.isolation import Job
from benchmarks.networks import FAST, NETWORKS
from benchmarks.zoo import LIBRARIES, ROOT, environment, read, settle, summary, write

needs_libraries = pytest.mark.skipif(
    not (LIBRARIES / "installed").exists(), reason="the libraries of the zoo are missing; run `make .zoo/installed`"
)
# few channels; an output that can't be cut
MISSED = {"hand/ThreeD": {"50", "25"}, "hand/TransposedGroups": {"50", "25"}}
# One of each library, and of each cause that the others lack; all twenty take minutes.
SEVEN = """
    hand/Shuffle hand/ThreeD timm/test_resnet timm/test_nfnet timm/ghostnet_050 torchvision/squeezenet1_1
    transformers/resnet
""".split()


def dies(report) -> None:
    report({"phase": "the end"})
    os._exit(3)


def hangs(report) -> None:
    report({"phase": "a long while", "targets": {"50": {"status": "ok"}, "25": {"status": "running"}}})
    time.sleep(60)


def answers(report, number: int) -> None:
    report({"phase": "", "number": number})


def outcome(job: Job) -> dict:
    while (found := job.result()) is None:
        time.sleep(0.01)
    return found


def test_what_a_process_reported_last_is_its_result():
    assert outcome(Job(answers, (7,), 30)) == {"phase": "", "number": 7, "ended": ""}


def test_a_process_that_dies_says_how_far_it_came():
    row = settle(outcome(Job(dies, (), 30)), [50])
    assert row["targets"] == {"50": {"status": "crash", "reason": "the process ended with exit status 3, in 'the end'"}}


def test_a_process_that_hangs_is_ended_and_keeps_what_it_had():
    started = time.monotonic()
    row = settle(outcome(Job(hangs, (), 0.5)), [50, 25])
    assert time.monotonic() - started < 20
    assert row["targets"]["50"] == {"status": "ok"}
    assert row["targets"]["25"] == {"status": "hang", "reason": "over the time limit of 0.5 s, in 'a long while'"}


def test_results_are_written_whole_and_read_back(tmp_path):
    path = tmp_path / "deep/zoo.json"
    assert read(path) == {"provenance": {}, "ours": {}, "peer": {}}
    write(path, {"ours": {"a": 1}})
    assert read(path) == {"ours": {"a": 1}}
    assert [p.name for p in path.parent.iterdir()] == ["zoo.json"]


def test_one_line_on_a_network():
    row = {
        "targets": {"50": {"status": "ok", "reached": 0.497, "seconds": 1.23}, "25": {"status": "hang", "reason": "x"}}
    }
    assert summary("n", row).split(maxsplit=1)[1] == "50 %: ok at 49.7% in 1.2 s  | 25 %: hang x"


def test_the_zoo_is_large_and_its_fast_part_belongs_to_it():
    assert len(NETWORKS) > 300
    assert len(set(FAST)) == 20
    assert set(SEVEN) < set(FAST) <= set(NETWORKS)


@needs_libraries
@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [SEVEN, pytest.param(FAST, marks=pytest.mark.slow)], ids=["seven", "twenty"])
def test_networks_of_other_people_work(names, tmp_path):
    out = tmp_path / "zoo.json"
    command = [sys.executable, "-m", "benchmarks.zoo", "--only", *names, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment()}, check=True, capture_output=True)
    results = json.loads(out.read_text("utf-8"))
    assert set(results["ours"]) == set(names)
    assert "timm" in results["provenance"]["ours"]["versions"]
    for name, row in results["ours"].items():
        assert not row.get("touched"), f"{name} was changed"
        for target, found in row["targets"].items():
            assert found["status"] == ("missed" if target in MISSED.get(name, ()) else "ok"), summary(name, row)
            assert found["status"] == "ok" or found["range"][0] < found["range"][1]
    proven = [row["zeroing"]["distance"] for row in results["ours"].values() if "distance" in row.get("zeroing", {})]
    assert len(proven) >= len(names) // 2


@needs_libraries
def test_the_peer_runs_in_the_same_harness(tmp_path):
    out = tmp_path / "zoo.json"
    command = [sys.executable, "-m", "benchmarks.zoo", "--peer", "--only", "timm/test_resnet", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment()}, check=True, capture_output=True)
    row = json.loads(out.read_text("utf-8"))["peer"]["timm/test_resnet"]
    assert row["targets"]["50"]["status"] == "ok"


def test_without_its_libraries_the_zoo_says_what_to_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.zoo", "--libraries", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make .zoo/installed" in done.stderr
