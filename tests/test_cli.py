"""The command line, in process: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dyncompress
from dyncompress import runner
from dyncompress.cli import main
from dyncompress.latency import Latency
from dyncompress.latencytable import LatencyTable, Timed

DIGITS = str(Path(__file__).parents[1] / "recipes/digits.yaml")
TINY = "--model.widths [8,16] --baseline.epochs 1 --epochs 1 --seeds [0] --trainer.limit_train_batches 2 --wandb null"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line: exit code, standard output, standard error."""

    def start(line: str) -> tuple[int, str, str]:
        try:
            code = main(line.split())
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return start


Command = Callable[[str], tuple[int, str, str]]


def test_plan_shows_range_and_layers_and_writes_the_plan(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, err = command(f"plan {DIGITS} --target 33% --model.widths [8,16] --out {path}")
    assert (code, err) == (0, "")
    assert "reachable with auto: " in out and "blocks.1.conv2" in out and "width kept: output of the network" in out
    assert dyncompress.Plan.load(path).ratio == pytest.approx(0.33, rel=0.01)


def test_plan_tells_every_limit(command: Command) -> None:
    code, out, err = command(f"plan {DIGITS} --target 33%,90%params --model.widths [8,16]")
    assert (code, err) == (0, "")
    told = " ".join(out.split())
    assert "MACs (" in told and "parameters (" in told
    assert "asked 33.00% of the MACs, achieved" in told and "asked 90.00% of the parameters, achieved" in told


def test_plan_measures_times_with_the_recipes_threads(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests run beside this one: times are those of a machine on which every pass takes a microsecond.
    timed = {"student": {1: Latency(1.0, 0.79, 0.0)}}
    monkeypatch.setattr("dyncompress.pacing.measure_latency", lambda *_, **__: timed)
    monkeypatch.setattr(
        "dyncompress.pacing.LatencyTable",
        lambda device: LatencyTable(device, tmp_path, lambda runs, _: Timed([1.0] * len(runs), 1e-6)),
    )
    threads = torch.get_num_threads() + 1
    path = tmp_path / "plan.json"
    words = f"--target 80%latency --method static --model.widths [8,16] --threads {threads} --out {path}"
    code, out, err = command(f"plan {DIGITS} {words}")
    assert (code, err) == (0, "")
    assert f"cpu, {threads} threads" in " ".join(out.split())
    assert torch.get_num_threads() == threads - 1


def test_plan_measures_what_the_allocation_asks_for(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Path(DIGITS).resolve()
    monkeypatch.chdir(tmp_path)
    words = "--target 50% --model.widths [8,16] --allocation sensitivity --importance bn --batches 1"
    code, out, err = command(f"plan {recipe} {words}")
    assert (code, err) == (0, "")
    assert "widths: sensitivity, channels by bn" in " ".join(out.split())
    assert len(list(Path("runs/sensitivity").iterdir())) == 1


def test_run_trains_compares_and_report_collects(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = runner.measure_latency
    monkeypatch.setattr(runner, "measure_latency", lambda nets, x: measured(nets, x, batch_sizes=(1,), rounds=5))
    code, out, err = command(f"run {DIGITS} --target 50% {TINY} --out {tmp_path}/a")
    assert (code, err) == (0, "")
    assert "asked 50%, achieved" in out and "student.safetensors" in out
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert report["macs_ratio"] == pytest.approx(0.5, rel=0.01)
    assert {name: score["n"] for name, score in report["score"].items()} == {"original": 1, "static": 1, "student": 1}

    code, out, err = command(f"report {tmp_path}")
    assert (code, err) == (0, "") and "digits" in out and "50%" in out
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_methods_lists_every_method_with_paper_and_options(command: Command) -> None:
    code, out, _ = command("methods")
    assert code == 0
    assert all(name in out for name in dyncompress.layers.list_methods())
    assert "2004.10694" in out and "g=4" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"run {DIGITS} --tarjet 33%", "unknown key 'tarjet'; did you mean 'target'? - allowed: model, data, target"),
        (f"run {DIGITS} --data.root /x", "data: digits.DigitsData has no argument 'root'"),
        (f"run {DIGITS} --target 0%", "target '0%' must be positive"),
        (f"run {DIGITS} --target 1%", "can't be reached with method 'auto'"),
        (f"run {DIGITS} --method odd", "no method 'odd'; known: auto, c2sp, "),
        (f"plan {DIGITS} --ignore [nothing]", "ignore 'nothing' matches no layer"),
        (f"plan {DIGITS} --baseline.checkpoint lost.pt", "lost.pt"),
        ("run lost.yaml", "recipe 'lost.yaml': No such file or directory"),
        ("plan", "no recipe is given"),
        ("report /nowhere", "no report.json below '/nowhere'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(command: Command, line: str, message: str) -> None:
    code, out, err = command(line)
    assert code == 2 and "Traceback" not in out + err
    assert err.startswith("dyncompress: ") and err.count("\n") == 1
    assert message in err


def test_missing_data_folder(command: Command) -> None:
    path = Path(DIGITS).with_name("cifar10_resnet20.yaml")
    code, _, err = command(f"run {path} --data.root /nowhere")
    assert code == 2 and "data.root '/nowhere' has no train.parquet" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--help", ["plan", "run", "report", "methods"]),
        ("run --help", ["--target TARGET", "--baseline.checkpoint", "--distill.alpha", "350k"]),
        ("report --help", ["folder"]),
        ("--version", [dyncompress.__version__]),
    ],
)
def test_help_tells_what_there_is(command: Command, line: str, words: list[str]) -> None:
    code, out, _ = command(line)
    assert code == 0 and all(word in out for word in words)


@pytest.mark.parametrize(("line", "word"), [("", "COMMAND"), ("rum x", "invalid choice: 'rum'"), ("methods x", "x")])
def test_usage_errors(command: Command, line: str, word: str) -> None:
    code, _, err = command(line)
    assert code == 2 and word in err


def test_python_m_equals_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dyncompress", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"dyncompress {dyncompress.__version__}\n"
