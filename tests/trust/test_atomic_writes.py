"""Writing files: a killed process, a full disk or two writers leave a whole file, the old one or the new one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dyncompress as dc
from dyncompress import files
from dyncompress.conversion import plan_of
from dyncompress.errors import WriteError
from dyncompress.plan import Plan
from dyncompress.sensitivity import measure
from tests.classifiers import Net
from tests.newer import writes_onnx

Figure = Callable[[str, object], None]
EXAMPLE = torch.zeros(1, 3, 8, 8)


def student(target: str = "50%") -> torch.nn.Module:
    torch.manual_seed(0)
    net = Net()
    return dc.convert(net, dc.make_plan(net, EXAMPLE, target)).eval()


# ---- killed ------------------------------------------------------------------------------------------------------

# One interpreter that is warm; every process that is killed is a fork of it.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import dyncompress as dc
from dyncompress.conversion import plan_of
from tests.classifiers import Net

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
path, example = folder / "student.safetensors", torch.zeros(1, 3, 8, 8)
torch.manual_seed(0)
net = Net(192)  # large enough for a write to take its time
students = [dc.convert(net, dc.make_plan(net, example, target)) for target in ("50%", "30%")]
states = {plan_of(s).target: s.state_dict() for s in students}
dc.save(students[0], path)
begun = time.perf_counter()
for s in students:
    dc.save(s, path)
pair = time.perf_counter() - begun

def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())

random.seed(0)
loaded, interrupted, most = {target: 0 for target in states}, 0, 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for s in students:
                dc.save(s, path)
    time.sleep(random.uniform(0, 2 * pair))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = [p for p in folder.iterdir() if p != path]
    interrupted, most = interrupted + bool(left), max(most, len(left))
    found = dc.load(path, net)
    target = plan_of(found).target
    loaded[target] += same(found.state_dict(), states[target])
dc.save(students[0], path)
print(json.dumps({"loaded": loaded, "interrupted": interrupted, "most": most,
                  "left": [p.name for p in folder.iterdir()], "pair": pair}))
"""


def killed(folder: Path, kills: int) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(kills)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    assert sum(found["loaded"].values()) == kills
    assert found["left"] == ["student.safetensors"]
    assert found["most"] <= 1  # what a killed process leaves, the next one removes
    return found


def test_a_few_killed_writers_lose_nothing(tmp_path: Path, record_property: Figure) -> None:
    """A process that is killed while it saves leaves a bundle that loads (a few times)."""
    found = killed(tmp_path, 10)
    record_property("figure", f"10 of 10 kill points loadable, {found['interrupted']} in the middle of a write")


@pytest.mark.slow
@pytest.mark.timeout(1600)  # minutes on an idle machine
def test_two_hundred_killed_writers_lose_nothing(tmp_path: Path, record_property: Figure) -> None:
    """A process that is killed while it saves leaves the old bundle or the new one, whole, at 200 random moments."""
    found = killed(tmp_path, 200)
    assert found["interrupted"] >= 50 and min(found["loaded"].values()) > 0
    record_property("figure", f"200 of 200 kill points loadable, {found['interrupted']} in the middle of a write")


# ---- every file that we write ------------------------------------------------------------------------------------


def write_bundle(folder: Path) -> Path:
    return dc.save(student(), folder / "student.safetensors")


def write_program(folder: Path) -> Path:
    return dc.export(student(), folder / "student.pt2", EXAMPLE)


def write_onnx(folder: Path) -> Path:
    pytest.importorskip("onnxruntime")
    return dc.export(student(), folder / "student.onnx", EXAMPLE)


def write_plan(folder: Path) -> Path:
    plan = plan_of(student())
    assert plan is not None
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def write_scores(folder: Path) -> Path:
    torch.manual_seed(0)
    measure(Net(), EXAMPLE, lambda net: 0.5, name="half", shares=(0.5,), cache=folder)
    (path,) = folder.glob("sensitivity-*.json")
    return path


WRITERS = {
    "bundle": write_bundle, "export (.pt2)": write_program, "export (.onnx)": write_onnx, "plan": write_plan,
    "sensitivity map": write_scores,
}  # fmt: skip


@pytest.mark.parametrize("what", [pytest.param(w, marks=writes_onnx) if "onnx" in w else w for w in WRITERS])
def test_a_failing_disk_leaves_the_old_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Figure
) -> None:
    """Every file is written beside its target: when the disk fails before it is safe there, the old one stays."""
    path = WRITERS[what](tmp_path)
    path.write_bytes(b"the old one" if what != "sensitivity map" else b"")
    if what == "sensitivity map":
        path.unlink()  # one that can't be read is an error of its own; here there is none yet
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(WriteError, match=r"can't be written \(.*Input/output error.*unchanged. Free some space"):
        WRITERS[what](tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    record_property("figure", f"{what}: unchanged, nothing left beside it")


FULL = """
import json, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dyncompress.errors import WriteError
from tests.trust.test_atomic_writes import WRITERS

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told = {}
for what in sys.argv[2:]:
    folder = Path(sys.argv[1], what)
    folder.mkdir()
    path = WRITERS[what](folder)
    content = path.read_bytes()
    if what == "sensitivity map":
        path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, resource.RLIM_INFINITY))
    try:
        WRITERS[what](folder)
    except WriteError as error:
        told[what] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if what != "sensitivity map":
        assert path.read_bytes() == content, what
    assert list(folder.iterdir()) == [path] * path.exists(), what
print(json.dumps(told))
"""


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path, record_property: Figure) -> None:
    """A disk that is full in the middle of a file gives a clear error, and the old file stays."""
    kinds = ["bundle", "export (.pt2)", "plan", "sensitivity map"]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path), *kinds],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert list(told) == kinds
    assert all("can't be written (" in text and "File too large" in text for text in told.values()), told
    record_property("figure", f"{len(told)} kinds of files, all unchanged")


# ---- beside others -----------------------------------------------------------------------------------------------


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path, record_property: Figure) -> None:
    """Several processes that save under one name leave one whole file."""
    path, texts = tmp_path / "a.json", [str(i) * 50_000 for i in range(4)]
    seen: set[str] = set()

    def save(text: str) -> None:
        for _ in range(25):
            files.write_text(path, text)
            seen.add(path.read_text())

    threads = [threading.Thread(target=save, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(texts) and path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    record_property("figure", "100 writes by 4 at once, 100 whole reads")


def test_a_living_writers_part_is_left_alone(tmp_path: Path) -> None:
    """What another process is writing is not taken for a leftover; what a dead one left is removed."""
    path = tmp_path / "a.json"
    left = tmp_path / ".a.json.0123abcd.part"
    left.mkdir()
    (left / "a.json").write_text("half")
    beside: list[str] = []

    def fill(part: Path) -> None:
        files.write_text(path, "theirs")
        beside.extend(p.name for p in tmp_path.iterdir() if p.name != "a.json")
        part.write_text("ours")

    files.write(path, fill)
    assert path.read_text() == "ours" and len(beside) == 1 and beside[0] != left.name
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_links_and_permissions_are_as_of_any_file(tmp_path: Path) -> None:
    """A link stays a link, and a new file is as readable as any other."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real/a.json")
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "link.json", "content")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real/a.json").read_text() == "content"
    bundle = write_bundle(tmp_path)
    modes = [file.stat().st_mode for file in (tmp_path / "plain", tmp_path / "real/a.json", bundle)]
    assert len(set(modes)) == 1


def test_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no file locks (Windows), files are written whole all the same."""
    monkeypatch.setattr(files, "fcntl", None)
    for text in ("one", "two"):
        files.write_text(tmp_path / "a.txt", text)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "two")]


def test_the_written_plan_is_the_plan(tmp_path: Path) -> None:
    """A plan that was saved loads as the plan that it was."""
    path = write_plan(tmp_path)
    assert Plan.load(path) == plan_of(student())
