"""The comparison of accuracies: arms on equal terms, rows, what is missing, verdicts, the page and its plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import jobs as work
from benchmarks.accuracy.arms import ARMS, Arm
from benchmarks.accuracy.jobs import Job, Row, Workshop, estimate, jobs, missing, store
from benchmarks.accuracy.networks import NETWORKS, SAME_TIME, TIERS, Case
from benchmarks.accuracy.page import NONE, PAGE, RESULTS, publish, sections, subject
from benchmarks.accuracy.plots import draw, points
from benchmarks.accuracy.verdicts import Verdict, complete, hardest
from benchmarks.methods import times
from benchmarks.methods.page import filled
from benchmarks.methods.times import Time
from benchmarks.speed.timing import Effort
from benchmarks.zoo import LIBRARIES, ROOT, environment
from dyncompress import arms as report_arms
from dyncompress.arms import Score
from dyncompress.layers import get_method
from dyncompress.plan import Plan
from dyncompress.recipe import read_recipe
from dyncompress.report import Report

CASE = Case("resnet20", "33%", (0, 1), 4)
STATIC, DYNET, PRUNED = ARMS["static"], ARMS["dynet"], ARMS["torch-pruning, magnitude"]


# ---- arms and cases ----------------------------------------------------------------------------------------------


def test_static_arms_get_all_that_dynamic_ones_get() -> None:
    assert len({arm.folder for arm in ARMS.values()}) == len(ARMS)
    ours = {arm.terms for arm in ARMS.values() if arm.control and not arm.pruner}
    assert {arm.terms for arm in ARMS.values() if not arm.control} <= ours
    for arm in ARMS.values():
        get_method(arm.method, **arm.options)


def test_an_arm_is_options_of_a_recipe(tmp_path: Path) -> None:
    arm = Arm("x", "odconv", {"kernels": 4}, "importance", "bn", {"bank": "copies"}, 0.2, {"kind": "dkd", "labels": 1})
    words = Workshop(tmp_path, {"cifar10": Path("there")}).words_of(Job(CASE, arm, 1))
    given = [w for key, value in words.items() for w in (f"--{key}", str(value))]
    recipe = read_recipe([str(NETWORKS["resnet20"].path), *given])
    assert (recipe.method, recipe.options, recipe.allocation) == ("odconv", {"kernels": 4}, "importance")
    assert (recipe.warm_start.bank, recipe.warmup, recipe.importance) == ("copies", 0.2, "bn")
    assert (recipe.distill.kind, recipe.distill.labels) == ("dkd", 1)
    assert (recipe.seeds, recipe.epochs, recipe.target, recipe.control) == ((1,), 4, "33%", False)
    assert recipe.data["init_args"]["root"] == "there"


def test_tiers_are_those_that_the_page_tells_of() -> None:
    cpu = {(c.network, c.budget, c.epochs): len(c.seeds) for c in TIERS["cpu"]}
    assert cpu["resnet20", "33%", 4] == cpu["resnet20", "25%", 4] == 3 and cpu["resnet20", "50%", 4] == 1
    assert cpu["resnet20", "33%", 12] == cpu["resnet20", "25%", 12] == 3
    assert cpu["camvid", "50%", 10] == cpu["camvid", "50% latency", 10] == 3
    gpu = {(c.network, c.budget) for c in TIERS["gpu"]}
    assert gpu == {(name, budget) for name in NETWORKS for budget in ("50%", "33%", "25%", SAME_TIME)}
    assert all(c.epochs >= 60 and len(c.seeds) == 3 for c in TIERS["gpu"])
    titles = {job.arm.title for job in jobs([replace(CASE, budget=SAME_TIME)])}
    assert titles == {arm.title for arm in ARMS.values() if not arm.pruner}
    assert not any(job.arm.allocation == "sensitivity" for job in jobs([Case("camvid", "50%", (0,), 10)]))


def test_networks_are_those_of_the_recipes() -> None:
    parameters = {name: sum(p.numel() for p in net.untrained().parameters()) for name, net in NETWORKS.items()}
    assert parameters["resnet20"] == 269_722 and parameters["resnet56"] == 853_018  # 0.27 M and 0.85 M in the paper
    assert NETWORKS["camvid"].untrained()(NETWORKS["camvid"].example).shape == (1, 11, 180, 240)


# ---- rows and what is missing ------------------------------------------------------------------------------------


def report(folder: Path, seed: int, accuracy: float, method: str = "static") -> None:
    student = report_arms.Arm(method, macs=33, params=50, score=Score.of({seed: accuracy}))
    Report("33%", method, report_arms.Arm("", 100, 40, Score.of(0.9)), student, name="net", epochs=4).save(folder)


def test_a_finished_folder_is_a_row_and_is_not_made_again(tmp_path: Path) -> None:
    shop, wanted = Workshop(tmp_path, {}), jobs([CASE], [STATIC, DYNET])
    folder = shop.place(wanted[0])
    assert folder == tmp_path / "resnet20-33-4/static/seed0"
    report(folder, 0, 0.8)
    (folder / "seconds.txt").write_text("600\n", "utf-8")
    rows = list(shop.finished(wanted))
    assert [(r.network, r.budget, r.arm, r.seed, r.accuracy, r.seconds) for r in rows] == [
        ("resnet20", "33%", "static", 0, 0.8, 600.0)
    ]
    store(tmp_path / "rows.csv").put(rows)
    kept = store(tmp_path / "rows.csv").read()
    assert kept == rows
    assert [str(job) for job in missing(wanted, kept)] == [
        "resnet20 at 33%, dynet, seed 0", "resnet20 at 33%, static, seed 1", "resnet20 at 33%, dynet, seed 1"
    ]  # fmt: skip
    assert len(missing(jobs([replace(CASE, epochs=60)], [STATIC]), kept)) == 2  # another training altogether
    # 150 s an epoch: of the same arm, else of the same network
    assert estimate(wanted[0], kept) == 600 and estimate(Job(replace(CASE, epochs=60), DYNET, 0), kept) == 9000
    assert estimate(Job(Case("camvid", "50%", (0,), 4), STATIC, 0), kept) is None


def fake(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs that write what they would: plans, a report; dynet's fails. Returns their command lines."""
    said: list[list[str]] = []

    def logged(words: Sequence[str], log: Path, environment: Any = None) -> int:
        said.append(list(words))
        log.parent.mkdir(parents=True, exist_ok=True)
        given = dict(pairwise(words))
        if "plan" in words:
            Path(given["--out"]).write_text("a plan", "utf-8")
        elif "benchmarks.accuracy.pruned" in words:
            return 2
        elif "benchmarks.accuracy.original" in words:
            (Path(given["--out"]) / "original.pt").write_text("weights", "utf-8")
        elif given["--method"] == "dynet":
            return 3
        else:
            folder = Path(given["--out"])
            assert (folder / "plan.json").read_text("utf-8") == "a plan"
            report(folder, json.loads(given["--seeds"])[0], 0.8)
        return 0

    monkeypatch.setattr(work, "logged", logged)
    monkeypatch.setattr("benchmarks.trainings.logged", logged)
    return said


def blank(page: Path) -> Path:
    page.write_text(
        "".join(f"<!-- {name} --><!-- /{name} -->" for name in ("verdicts", "dependence", *NETWORKS)), "utf-8"
    )
    return page


def test_failures_are_counted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fake(monkeypatch)
    monkeypatch.setitem(TIERS, "cpu", (CASE,))
    page = blank(tmp_path / "page.md")
    words = ["--data", f"cifar10={tmp_path}", "--out", f"{tmp_path}/out", "--results", str(tmp_path)]
    words += ["--page", str(page), "--arms", "static", "dynet", PRUNED.title, "--side-by-side", "2"]
    assert command.main(words) == 4  # two seeds of dynet, two of a plan that isn't there
    told = capsys.readouterr().out
    assert "original of resnet20: done" in told and "resnet20 at 33%, static, seed 1: done" in told
    assert "resnet20 at 33%, dynet, seed 0: exit status 3" in told
    assert f"resnet20 at 33%, {PRUNED.title}, seed 0: exit status 2" in told
    plans = [line for line in said if "plan" in line]
    assert len(plans) == 2 and all("[0]" in line for line in plans)  # one per arm, whatever the seed
    assert "| static | 33.0% | 1.25x | 80.00 ± 0.00 | 2 |  | best static arm |" in page.read_text("utf-8")
    said.clear()
    assert command.main([*words, "--list"]) == 0
    told = capsys.readouterr().out
    assert not said and "4 of 6 missing" in told and "static" not in told
    assert command.main(words) == 4 and not any("original" in " ".join(line[2:3]) for line in said)


def test_teachers_remember_only_where_answers_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake(monkeypatch)
    data = {"cifar10": tmp_path, "camvid": tmp_path}
    shop = Workshop(tmp_path, data, {name: tmp_path / "w.pt" for name in NETWORKS})
    for case in (CASE, Case("camvid", "50%", (0,), 10)):
        assert shop.run(Job(case, STATIC, 0)) == 0
    runs = [line for line in said if "run" in line]
    assert runs[0][2:4] == ["benchmarks.remembered", str(tmp_path / "resnet20/answers")]
    assert runs[1][2:4] == ["dyncompress", "run"]


# ---- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "text", "word"),
    [
        # standard deviations 1 and 2 points, 3 seeds: 2 sqrt(1/3 + 4/3) = 2.58
        ((0.84, 0.85, 0.86), (0.80, 0.82, 0.84), "+3.00 ± 2.58", "ahead"),
        ((0.83, 0.84, 0.85), (0.80, 0.82, 0.84), "+2.00 ± 2.58", "no difference"),
        ((0.78, 0.79, 0.80), (0.80, 0.82, 0.84), "-3.00 ± 2.58", "behind"),
        ((0.84,), (0.80, 0.82, 0.84), "+4.00", "one seed"),  # of seed 0, which both have
        ((0.82, 0.81996), (0.82, 0.82), "+0.00 ± 0.00", "no difference"),
        ((0.82, 0.82), (0.82, 0.82), "+0.00 ± 0.00", "no difference"),
    ],
)
def test_verdicts_by_hand(one: Sequence[float], other: Sequence[float], text: str, word: str) -> None:
    found = Verdict.of(*(Score.of(dict(enumerate(values))) for values in (one, other)))
    assert (str(found), found.word) == (text, word)


def test_arms_are_compared_on_the_seeds_that_both_have() -> None:
    """Seed 0 is a good one, for all: 42.5 against a mean of 42.1 looks ahead, and is behind 42.8."""
    three = Score.of({0: 0.428, 1: 0.420, 2: 0.415})
    assert str(Verdict.of(Score.of({0: 0.425}), three)) == "-0.30"
    assert Verdict.of(Score.of({0: 0.425}), three).word == "one seed"
    assert str(Verdict.of(Score.of({1: 0.43, 2: 0.43, 3: 0.1}), three)) == "+1.25 ± 0.50"  # 0.430 - 0.4175
    assert str(Verdict.of(Score.of({7: 0.43}), Score.of({0: 0.42}))) == "+1.00"


def test_the_best_arm_is_one_of_those_with_most_seeds() -> None:
    reached = {"static": Score.of({0: 0.8, 1: 0.7}), PRUNED.title: Score.of(0.81)}
    assert list(complete(reached)) == ["static"] and complete({}) == {}
    assert hardest(reached, tuple(ARMS.values())) == "static"


def test_the_hardest_control_may_be_the_peers() -> None:
    reached = {"static": Score.of(0.8), PRUNED.title: Score.of(0.81), "dynet": Score.of(0.9)}
    assert hardest(reached, tuple(ARMS.values())) == PRUNED.title
    assert hardest({"dynet": Score.of(0.9)}, tuple(ARMS.values())) is None


# ---- page and plots ----------------------------------------------------------------------------------------------


def row(arm: str, seed: int, accuracy: float, budget: str = "33%", macs: int = 33) -> Row:
    there = ("2026-01-02T00:00:00Z", "abc", "abacus", 1, "torch 9.9", "run")
    numbers = (budget, 4, seed, accuracy, macs, 50, 0, 0.9, 100, 40)
    return Row(*numbers, *there, network="resnet20", budget=budget, arm=arm, seconds=None)


REACHED = {"static": (0.80, 0.82, 0.84), "dynet": (0.84, 0.85, 0.86)}
ROWS = [row(arm, seed, accuracy) for arm, found in REACHED.items() for seed, accuracy in enumerate(found)]
ROWS += [row(PRUNED.title, 0, 0.79), row("static", 0, 0.7, "25%", 25), row("dynet", 0, 0.72, "25%", 25)]
NAME = subject("resnet20", "33%", 4)
TIMED = [Time(NAME, arm, 1, ratio, ratio, 0.1, 20, 0.33, 1.25) for arm, ratio in (("original", 1.0), ("dynet", 0.7))]


def test_the_page_tells_who_is_ahead(tmp_path: Path) -> None:
    store(tmp_path / "resnet20.csv").put(ROWS)
    times.store(tmp_path / "resnet20-times.csv").put(TIMED)
    times.note(tmp_path / "resnet20-times.csv", ["python"], Effort(5, 1.0))
    made = sections(tmp_path)
    title = "CIFAR-10 ResNet-20"
    assert f"| {title} | 33% | 4 | dynet | static | +3.00 ± 2.58 | ahead | +5.00 | -5.00 |" in made["verdicts"]
    assert f"| {title} | 25% | 4 | dynet | static | +2.00 | one seed |  | -18.00 |" in made["verdicts"]
    text = made["resnet20"]
    assert text.index("**33% of the MACs, 4 epochs**") < text.index("**25% of the MACs, 4 epochs**")
    assert "| dynet | 33.0% | 1.25x | 0.70 (0.10) | 85.00 ± 1.00 | 3 | +3.00 ± 2.58 | ahead |" in text
    assert "| static | 33.0% | 1.25x | | 82.00 ± 2.00 | 3 |  | best static arm |" in text
    assert "commit `abc`" in text and made["camvid"] == NONE
    page = blank(tmp_path / "page.md")
    assert list(publish(tmp_path, page)) == [tmp_path / "resnet20.png", page]
    assert "+3.00 ± 2.58" in page.read_text("utf-8")


def test_the_plot_has_a_point_per_arm_and_budget() -> None:
    found = points(ROWS)
    assert found["dynet"] == [(0.25, pytest.approx(72), 0.0), (0.33, pytest.approx(85), pytest.approx(1))]
    assert points(ROWS, {(NAME, "dynet"): 0.7}) == {"dynet": [(0.7, pytest.approx(85), pytest.approx(1))]}
    left, _ = draw(NETWORKS["resnet20"], ROWS, TIMED).axes
    assert len(draw(NETWORKS["resnet20"], ROWS, []).axes) == 1  # without times there is nothing to put on the other
    assert {text.get_text() for text in left.get_legend().get_texts()} == {"original", "static", PRUNED.title, "dynet"}  # type: ignore[union-attr]


def test_the_page_is_what_the_results_say() -> None:
    text = PAGE.read_text("utf-8")
    assert filled(text, sections(RESULTS)) == text, "python -m benchmarks.accuracy  writes it again"


# ---- torch-pruning -----------------------------------------------------------------------------------------------

MAPPED = """
import benchmarks.operators, json, sys, torch
sys.path.insert(0, "recipes")
from benchmarks import peer
from benchmarks.accuracy.pruned import RANKINGS, as_plan, importance
from cifar10 import ResNet
from dyncompress.cost import measure_macs

torch.manual_seed(0)
net, x = ResNet(8).eval(), torch.randn(1, 3, 32, 32)
batches = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
for ranking in RANKINGS:
    pruned = peer.search(net, x, 0.4, True, importance(ranking, batches))
    as_plan(net, x, pruned).save(f"{sys.argv[1]}/{ranking}.json")
    found = {"macs": measure_macs(pruned.network, x), "reached": pruned.reached, "first": pruned.history[0],
             "shapes": {n: list(p.shape) for n, p in pruned.network.named_parameters()}}
    with open(f"{sys.argv[1]}/{ranking}.found", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (LIBRARIES / "installed").exists(), reason="the libraries of the zoo are missing; run `make .zoo/installed`"
)
def test_torch_prunings_choice_is_a_plan_of_the_same_network(tmp_path: Path) -> None:
    words = [sys.executable, "-c", MAPPED, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment()})
    assert done.returncode == 0, done.stderr
    for ranking in ("magnitude", "taylor"):
        plan = Plan.load(tmp_path / f"{ranking}.json")
        said = json.loads((tmp_path / f"{ranking}.found").read_text("utf-8"))
        assert plan.macs_after == said["macs"] and plan.ratio == pytest.approx(said["reached"])
        assert said["reached"] == pytest.approx(0.4, rel=0.05)
        outputs = {layer.name: layer.out_after for layer in plan.layers}
        assert {name: said["shapes"][f"{name}.weight"][0] for name in outputs} == outputs
        module, _, cut = said["first"]
        (stream,) = [g for g, group in enumerate(plan.graph.groups) if group.name == module]
        kept = plan.keep[stream]
        assert isinstance(kept, tuple) and not set(kept) & set(cut)
        assert len(kept) + len(cut) == plan.graph.groups[stream].channels
