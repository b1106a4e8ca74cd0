"""Security: reading a file never runs it, names in files are never paths, and nothing leaves the machine."""

from __future__ import annotations

import ast
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dyncompress as dc
from dyncompress import DynCompress
from dyncompress.bundle import read_state
from dyncompress.checkpoint import read_plan
from dyncompress.errors import CheckpointError, RecipeError
from dyncompress.provenance import Environment
from dyncompress.recipe import read_recipe
from tests.classifiers import Net, classifier, fit, weights

ROOT = Path(__file__).parents[2]
Figure = Callable[[str, object], None]
Classifier = classifier()


# ---- the source --------------------------------------------------------------------------------------------------


def unsafe(source: str) -> list[str]:
    """Calls and imports that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in {"pickle", "marshal", "shelve", "dill", "joblib"}]
        elif isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
                found.append(called)
            if called in {"torch.load", "np.load", "numpy.load"} and keywords.get("weights_only") != "True":
                found.append(called)
            if keywords.get("shell") == "True":
                found.append(called)
    return found


def test_no_source_of_ours_loads_a_pickle(record_property: Figure) -> None:
    """No file is read as a pickle, evaluated, or given to a shell."""
    files = sorted((ROOT / "dyncompress").rglob("*.py"))
    assert {str(p): unsafe(p.read_text("utf-8")) for p in files} == {str(p): [] for p in files}
    planted = "import pickle\ntorch.load(path)\neval(text)\nsubprocess.run(line, shell=True)"
    assert len(unsafe(planted)) == 4
    record_property("figure", f"{len(files)} source files")


# ---- files that would run code -----------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


DOORS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: dc.load(path, Net()),
    "load_from_checkpoint": lambda path: dc.load_from_checkpoint(Classifier, path),
    "teacher=": lambda path: fit(Classifier(), DynCompress("50%", teacher=path)),
    "plan=": lambda path: fit(Classifier(), DynCompress(plan=path)),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "old format"])
@pytest.mark.parametrize("door", DOORS)
def test_a_checkpoint_that_would_run_code_is_refused(
    door: str, legacy: bool, tmp_path: Path, record_property: Figure
) -> None:
    """A checkpoint whose loading would run a command is refused, and the command does not run."""
    sentinel, path = tmp_path / "ran", tmp_path / "a.ckpt"
    content = {"state_dict": Net().state_dict(), "hyper_parameters": Bomb(sentinel)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"system|holds objects beside weights"):
        DOORS[door](path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)
    assert sentinel.exists()  # it would have
    record_property("figure", f"{door}: not run")


def test_a_recipe_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A recipe with a Python object in its YAML is refused, and the object is not made."""
    sentinel, path = tmp_path / "ran", tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:os.system ['touch {sentinel}']\ntarget: 50%\n")
    with pytest.raises(RecipeError):
        read_recipe([str(path)])
    assert not sentinel.exists()


# ---- files that would fill memory or leave their folder ----------------------------------------------------------


def grown(read: Callable[[], Any]) -> float:
    """MB that the peak memory of this process grows by while a file is refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_files_that_claim_gigabytes_are_refused(tmp_path: Path, record_property: Figure) -> None:
    """A small file that claims gigabytes is refused before memory is taken."""
    made = {}
    for name, length in (("huge", 2**63 - 1), ("large", 90_000_000)):
        made[name] = tmp_path / f"{name}.safetensors"
        made[name].write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32"}}')
    shape = [2**20, 2**12]
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 2**32]}}).encode()
    made["tensor"] = tmp_path / "tensor.safetensors"
    made["tensor"].write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 64)
    torch.save({"a": torch.zeros(4)}, tmp_path / "plain.pt")
    made["bomb"] = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(made["bomb"], "w") as bomb:
        for record in plain.infolist():
            if record.filename.endswith("data/0"):
                bomb.writestr(record.filename, bytes(2**28), zipfile.ZIP_DEFLATED)
            else:
                bomb.writestr(record.filename, plain.read(record))
    with pytest.raises(CheckpointError):
        read_state(made["huge"])  # whatever is imported on the way has been
    took = {name: grown(lambda path=path: read_state(path)) for name, path in made.items()}  # type: ignore[misc]
    assert all(size < 64 for size in took.values()), took
    assert made["bomb"].stat().st_size < 2**20
    record_property("figure", f"{len(took)} files, at most {max(took.values()):.0f} MB more in memory")


def test_names_in_files_are_never_paths(tmp_path: Path, record_property: Figure) -> None:
    """A tensor or record called ../../x is a name: nothing is written anywhere."""
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    names = ["../../x", "/tmp/x", "..\\x", "a/../../../x._dyncompress._extra_state"]
    state = {name: torch.zeros(2, dtype=torch.uint8) for name in names}
    save_file(state, inner / "a.safetensors")
    torch.save(state, inner / "a.pt")
    (inner / "plan.json").write_text(json.dumps({"schema": 2, "network": {"../../x": 1}}))
    before = sorted(tmp_path.rglob("*"))
    for path in (inner / "a.safetensors", inner / "a.pt"):
        assert set(read_state(path)) == set(names)
        with pytest.raises(CheckpointError):
            dc.load(path, Net())
        with pytest.raises(CheckpointError):
            read_plan(path)
    with pytest.raises(dc.DynCompressError):
        read_plan(inner / "plan.json")
    assert sorted(tmp_path.rglob("*")) == before
    record_property("figure", f"{len(names)} names, no file written")


# ---- what leaves the machine -------------------------------------------------------------------------------------

WATCHED = """
import json, socket, sys
from pathlib import Path

seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        seen.append([event, str(args[1] if event != "socket.getaddrinfo" else args[0])])
sys.addaudithook(watch)

import torch
torch.set_num_threads(1)
import dyncompress as dc
from tests.classifiers import Net, classifier, fit
folder = Path(sys.argv[1])
net, x = Net(), torch.zeros(1, 3, 8, 8)
plan = dc.make_plan(net, x, "50%")
plan.save(folder / "plan.json")
student = dc.convert(net, plan)
dc.save(student, folder / "s.safetensors")
dc.load(folder / "s.safetensors", net)
dc.export(student, folder / "s.pt2", x)
module = classifier()()
host = fit(module, dc.DynCompress("50%"))
host.save_checkpoint(folder / "a.ckpt")
dc.load_from_checkpoint(classifier(), folder / "a.ckpt")
count = len(seen)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
print(json.dumps([seen[:count], len(seen) - count]))
"""


@pytest.mark.slow
def test_no_telemetry(tmp_path: Path, record_property: Figure) -> None:
    """Import, plan, convert, save, load, export and a whole fit open no connection to any other machine."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    seen, control = json.loads(run.stdout.splitlines()[-1])
    assert control == 1  # the watch works
    assert seen == []
    record_property("figure", "0 connections, 0 names looked up")


@pytest.mark.slow
def test_a_key_in_the_environment_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Figure
) -> None:
    """A W&B key in the environment or on the command line is in none of the files that a run writes."""
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    key = "0123456789abcdef" * 2 + "01234567"  # of the form that W&B takes
    monkeypatch.setenv("WANDB_API_KEY", key)
    logger = WandbLogger(project="p", save_dir=str(tmp_path), offline=True, log_model=False)
    module = Classifier()
    host = fit(module, DynCompress("50%"), logger=logger)
    wandb.finish()
    wandb.teardown()
    host.save_checkpoint(tmp_path / "a.ckpt")
    dc.save(module.net, tmp_path / "s.safetensors")
    command = ["dyncompress", "run", "r.yaml", f"--api_key={key}", "--wandb_token", key]
    (tmp_path / "environment.txt").write_text(repr(Environment.here(command)))
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert any(p.suffix == ".wandb" for p in written)
    assert [str(p) for p in written if key.encode() in p.read_bytes()] == []
    assert weights(module)
    record_property("figure", f"{len(written)} files")
