"""The report: numbers that a reader can check by hand, words that follow from them, files that read back."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dyncompress.arms import Arm, Score
from dyncompress.errors import DynCompressError
from dyncompress.latency import Latency
from dyncompress.plotting import Panel, Point, draw, pixels
from dyncompress.provenance import Environment
from dyncompress.report import Report, collect, tradeoff_plot, tradeoff_table

ENVIRONMENT = Environment(
    date="2026-01-02T03:04:05Z",
    command="dyncompress run digits.yaml",
    hardware="a processor",
    threads=1,
    allocator="default",
    versions={"torch": "2.4.0"},
)


def latencies(batch_1: float, batch_32: float) -> dict[int, Latency]:
    """Latencies as multiples of 2 ms and 40 ms."""
    return {1: Latency(2 * batch_1, batch_1, 0.02), 32: Latency(40 * batch_32, batch_32, 0.02)}


ORIGINAL = Arm("", 1_000_000, 50_000, Score.of({0: 0.97, 1: 0.98}), 0, latencies(1, 1))
STATIC = Arm("static", 330_000, 17_000, Score.of({0: 0.90, 1: 0.92, 2: 0.94}), 0, latencies(0.6, 0.4))
STUDENT = Arm("dynet", 331_000, 40_000, Score.of({0: 0.95, 1: 0.96, 2: 0.97}), 120_000, latencies(0.6, 0.4))
REPORT = Report(
    target="33%",
    method="dynet",
    original=ORIGINAL,
    student=STUDENT,
    static=STATIC,
    name="digits",
    epochs=12,
    environment=ENVIRONMENT,
)


def report(student: Arm = STUDENT, static: Arm | None = STATIC, target: str = "33%") -> Report:
    return replace(REPORT, student=student, static=static, target=target)


def test_mean_and_sample_deviation() -> None:
    # mean of 0.90, 0.92, 0.94; deviations -0.02, 0, 0.02: sqrt(0.0008 / 2) = 0.02
    assert STATIC.score.mean == pytest.approx(0.92)
    assert STATIC.score.std == pytest.approx(0.02)
    assert STATIC.score.n == 3


def test_a_spread_that_is_not_known_is_not_zero() -> None:
    assert (Score.of(0.5).mean, Score.of(0.5).std, Score.of(0.5).n) == (0.5, None, 1)
    assert (Score().mean, Score().std, Score().n) == (None, None, 0)


@pytest.mark.parametrize("seeds", [((0, float("nan")),), ((0, float("inf")),), ((1, 0.5), (1, 0.6))])
def test_scores_that_cannot_be_averaged(seeds: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(DynCompressError, match="cannot average"):
        Score(seeds)


def test_ratios_are_to_the_original() -> None:
    assert REPORT.macs_ratio == 0.331
    assert REPORT.params_ratio == 0.8
    assert REPORT.latency_ratio == {1: 0.6, 32: 0.4}


@pytest.mark.parametrize(
    ("target", "quantity", "asked", "achieved"),
    [
        ("33%", "macs", 0.33, 0.331),
        ("0.33", "macs", 0.33, 0.331),
        ("330k", "macs", 0.33, 0.331),
        ("80% params", "params", 0.8, 0.8),
        ("40k params", "params", 0.8, 0.8),
        ("60% latency", "latency", 0.6, 0.6),
    ],
)
def test_asked_and_achieved_are_the_same_quantity(target: str, quantity: str, asked: float, achieved: float) -> None:
    made = report(target=target)
    assert (made.quantity, made.asked, made.achieved) == (quantity, pytest.approx(asked), achieved)
    assert not [note for note in made.notes() if "missed" in note]


def test_several_limits_are_told_one_by_one() -> None:
    made = report(target="33%, 85% params")
    assert [(o.limit.quantity, o.asked, o.achieved) for o in made.limits] == [
        ("macs", 0.33, 0.331),
        ("params", 0.85, 0.8),
    ]
    assert (made.quantity, made.asked, made.achieved) == ("macs", 0.33, 0.331)
    told = "asked 33%, achieved 33.1% of the original's MACs; asked 85% params, achieved 80.0% of the original's "
    assert f"{told}parameters" in " ".join(str(made).split())
    assert made.notes() == []  # the MACs bind; fewer parameters than allowed are no miss


@pytest.mark.parametrize("target", ["33%, 70% params", "40%, 90% params", "33%, 50% latency"])
def test_a_limit_that_is_exceeded_and_a_target_that_nothing_reaches_are_missed(target: str) -> None:
    assert [note for note in report(target=target).notes() if "the target was missed" in note]


def test_a_good_result_needs_no_warning() -> None:
    # 0.96 against 0.92, two standard errors 2 sqrt(0.02^2 / 3 + 0.01^2 / 3) = 0.0258
    assert report().notes() == []


@pytest.mark.parametrize(
    ("made", "note"),
    [
        (
            report(target="30%"),
            "the target was missed: asked 30%, achieved 33.1% of the original's MACs",
        ),
        (
            report(replace(STUDENT, latency=latencies(1.57, 1.06)), replace(STATIC, latency={})),
            "slower than the original at batch 1 (1.57x) and batch 32 (1.06x) although FLOPs fell to 33%: "
            "for speed give a latency target or method='static'",
        ),
        (
            report(replace(STATIC, latency=latencies(1.1, 0.4))),  # a student that is static is told no such thing
            "slower than the original at batch 1 (1.10x) although FLOPs fell to 33%: for speed give a latency target",
        ),
        (
            report(replace(STUDENT, latency=latencies(0.6, 1.1)), replace(STATIC, latency={}), "60% latency"),
            "slower than the original at batch 32 (1.10x) although FLOPs fell to 33%: for speed give method='static'",
        ),
        (
            report(replace(STUDENT, latency=latencies(0.6, 0.97)), replace(STATIC, latency={})),
            "FLOPs fell to 33% but batch-32 latency is 0.97x of the original",  # within the noise
        ),
        (report(replace(STUDENT, params=75_000)), "parameters grew to 1.50x of the original"),
        (
            report(replace(STUDENT, score=Score.of({0: 0.88, 1: 0.88, 2: 0.88}))),
            "the dynamic network is not better than the static control: 88.00 against 92.00 "
            "(two standard errors are 2.31, 3 and 3 seeds)",  # 2 * 0.02 / sqrt(3)
        ),
        (
            report(replace(STUDENT, score=Score.of({0: 0.91, 1: 0.93, 2: 0.95}))),
            "no difference within the spread between the dynamic network and the static control: "
            "93.00 against 92.00 (two standard errors are 3.27, 3 and 3 seeds)",
        ),
        (
            report(replace(STUDENT, score=Score.of({0: 0.92}))),
            "the dynamic network is not better than the static control: 92.00 against 92.00",
        ),
        (
            report(replace(STUDENT, score=Score.of({0: 0.95}))),
            "the gain over the static control may be chance, a single seed has no spread: 95.00 against 92.00",
        ),
        (
            report(replace(STUDENT, score=Score())),
            "no score of the static control and the dynamic network to compare",
        ),
        (
            report(static=replace(STATIC, macs=300_000)),
            "the comparison is not at equal cost: the student has 1.10x the MACs of the control",
        ),
        (
            report(replace(STUDENT, latency=latencies(0.9, 0.4))),
            "at batch 1 the dynamic network takes 1.50x the time of the static control",
        ),
    ],
)
def test_the_note_that_the_numbers_ask_for(made: Report, note: str) -> None:
    assert made.notes() == [note]


def test_scores_above_one_are_not_called_points() -> None:
    made = report(replace(STUDENT, score=Score.of({0: 31.5})), replace(STATIC, score=Score.of({0: 32.0})))
    assert made.notes() == ["the dynamic network is not better than the static control: 31.5 against 32"]


def test_the_control_itself_is_not_compared_with_a_control() -> None:
    assert report(STATIC).notes() == []
    assert report(STATIC, static=None).notes() == []


def test_text_shows_asked_and_achieved_and_fits_a_terminal() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0].strip() == "digits with dynet: asked 33%, achieved 33.1% of the original's MACs"
    cells = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert cells["original"] == "97.50 ±0.71 2 1M 100.0% 50k 1.00x - 2 1.00x 40 1.00x".split()
    assert cells["static"] == "92.00 ±2.00 3 330k 33.0% 17k 0.34x - 1.2 0.60x 16 0.40x".split()
    assert cells["dynet"] == "96.00 ±1.00 3 331k 33.1% 40k 0.80x 120kB 1.2 0.60x 16 0.40x".split()
    assert max(map(len, lines)) <= 100
    wide = report(
        replace(STUDENT, method="kernelwarehouse", macs=331_234_567, params=40_123_456, bank_bytes=123_456_789),
    )
    assert not [line for line in str(wide).splitlines() if "…" in line or len(line) > 100]


def test_a_terminal_of_80_columns_shows_every_name() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(REPORT.table())
    names = [line.split()[0] for line in capture.get().splitlines()[3:]]
    assert names == ["original", "static", "dynet"]


def test_text_carries_the_notes() -> None:
    made = report(replace(STUDENT, params=75_000))
    assert "! parameters grew to 1.50x of the original" in str(made)


def test_a_report_without_control_scores_or_latency() -> None:
    bare = Report("33%", "dynet", Arm("", 100, 10), Arm("dynet", 33, 10), environment=ENVIRONMENT)
    assert bare.notes() == []
    assert bare.achieved == 0.33
    assert Report.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    assert str(bare).splitlines()[3].split() == "dynet - 0 33 33.0% 10 1.00x -".split()
    assert pixels(bare.figure()).std() > 0


def test_files_of_a_report_read_back(tmp_path: Path) -> None:
    folder = REPORT.save(tmp_path / "runs" / "digits")
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.csv", "tradeoff.png"}
    assert Report.load(folder) == REPORT
    assert Report.load(folder / "report.json") == REPORT


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    content = json.loads((REPORT.save(tmp_path) / "report.json").read_text("utf-8"))
    assert content["target"] == {
        "asked": "33%", "quantity": "macs", "asked_ratio": 0.33, "achieved": 0.331,
    }  # fmt: skip
    assert (content["macs_ratio"], content["params_ratio"]) == (0.331, 0.8)
    assert content["latency_ratio"] == {"1": 0.6, "32": 0.4}
    assert content["score"]["static"] == {
        "mean": pytest.approx(0.92),
        "std": pytest.approx(0.02),
        "n": 3,
        "seeds": {"0": 0.9, "1": 0.92, "2": 0.94},
    }
    assert set(content["score"]) == {"original", "static", "student"}
    page = (Path(__file__).parents[1] / "docs/report.md").read_text("utf-8")
    leaves = {*content, *content["target"], *content["environment"], *content["arms"]["student"]}
    assert not [key for key in leaves | {"mean", "std", "n", "seeds", "iqr"} if f"`{key}`" not in page]


def test_csv_has_one_row_per_arm(tmp_path: Path) -> None:
    with (REPORT.save(tmp_path) / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["original", "static", "student"]
    assert rows[2]["macs_ratio"] == "0.331"
    assert float(rows[2]["val_acc_mean"]) == pytest.approx(0.96)
    assert rows[2]["latency_ratio_b32"] == "0.4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a report"),
        ("[]", "not a report"),
        ("{}", "not a report"),
        ('{"version": 99}', "version 99; dyncompress .* reads version 1"),
    ],
)
def test_an_unreadable_report_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(DynCompressError, match=rf"report\.json: .*{message}"):
        Report.load(tmp_path / "report.json")


def test_reports_are_collected_oldest_first_and_broken_ones_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = replace(REPORT, environment=replace(ENVIRONMENT, date="2026-02-01T00:00:00Z"), target="34%")
    late.save(tmp_path / "a")
    REPORT.save(tmp_path / "b" / "deep")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "dyncompress"):
        assert collect(tmp_path) == [REPORT, late]
    (line,) = caplog.messages
    assert str(tmp_path / "broken" / "report.json") in line
    assert collect(tmp_path / "nothing") == []


def test_tradeoff_table_has_a_line_per_report() -> None:
    half = replace(REPORT, target="50%", student=replace(STUDENT, macs=500_000), name="cifar10_resnet20")
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(tradeoff_table([REPORT, half]))
    _, _, first, second = capture.get().splitlines()
    scores = "97.50 ±0.71 92.00 ±2.00 96.00 ±1.00".split()
    assert first.split() == ["cifar10_resnet20", *"dynet 50% 50.0% 0.80x 0.60x 0.40x".split(), *scores]
    assert second.split() == ["digits", *"dynet 33% 33.1% 0.80x 0.60x 0.40x".split(), *scores]


def image(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of that colour."""
    return int((np.abs(picture.astype(int) - colour).max(axis=-1) <= 2).sum())


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_plot_shows_the_student_and_a_second_method_only_where_there_is_one(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "one")
    one = image(tmp_path / "one" / "tradeoff.png")
    other = replace(REPORT, method="odconv", student=replace(STUDENT, method="odconv", macs=250_000))
    two = image(tradeoff_plot([REPORT, other], tmp_path / "two.png"))
    assert one.shape[0] > 500 and one.shape[1] > 1500  # MACs, batch 1, batch 32 side by side
    assert one.shape == two.shape
    assert coloured(one, BLUE) > 100 and coloured(two, BLUE) > 100
    assert coloured(one, ORANGE) == 0 and coloured(two, ORANGE) > 100


def test_each_network_has_a_row_of_its_own() -> None:
    points = [Point("dynet", {"MACs": 0.3}, [0.8])]
    panel = Panel("a", "val_acc", True, [0.9], points)
    one, two = draw([panel], ["MACs"]), draw([panel, replace(panel, title="b")], ["MACs"])
    assert len(one.axes) == 1 and len(two.axes) == 2
    assert [axes.get_title(loc="left") for axes in two.axes] == ["a", "b"]


def test_a_point_lies_where_its_cost_and_mean_say() -> None:
    axes = draw([Panel("a", "val_acc", True, [], [Point("dynet", {"MACs": 0.3}, [0.7, 0.8])])], ["MACs"]).axes[0]
    markers = [line.get_xydata().tolist() for line in axes.lines if line.get_markersize() == 7]
    assert markers == [[[0.3, pytest.approx(0.75)]]]
    seeds = [line.get_ydata().tolist() for line in axes.lines if line.get_markersize() == 3.5]
    assert seeds == [[0.7, 0.8]]


def test_labels_of_equal_points_do_not_lie_on_each_other() -> None:
    points = [Point(name, {"MACs": 0.3}, [0.8]) for name in ("static", "dynet", "odconv")]
    figure = draw([Panel("a", "val_acc", True, [0.9], points)], ["MACs"])
    pixels(figure)  # lays it out
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_drawing_leaves_the_figures_of_others_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    REPORT.figure()
    assert plt.get_fignums() == before


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(DynCompressError, match="no report to draw"):
        tradeoff_plot([], "nowhere.png")


def test_provenance_of_this_process() -> None:
    import torch

    here = Environment.here(["dyncompress", "run", "--target", "33%"])
    assert here.command == "dyncompress run --target 33%"
    assert here.versions["torch"] == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert here.hardware
    assert len(here.date) == len("2026-01-02T03:04:05Z")


def test_allocator_settings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "8589934592")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("dyncompress.allocator.freed_memory_is_kept", False)  # another test may have run the command
    assert Environment.here([]).allocator == "MALLOC_MMAP_THRESHOLD_=8589934592"


@pytest.mark.parametrize(
    "words",
    [["--api_key=abc"], ["--logger.init_args.api_key", "abc"], ["WANDB_API_KEY=abc"], ["--hub-token", "abc"]],
)
def test_no_secret_is_written_down(words: list[str]) -> None:
    command = Environment.here(["dyncompress", *words, "--target", "33%"]).command
    assert "abc" not in command
    assert command.endswith("--target 33%")


def test_words_about_keys_are_no_secrets() -> None:
    assert Environment.here(["run", "monkey.yaml", "--keys=3"]).command.startswith("run monkey.yaml")
