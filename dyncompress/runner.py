"""Run a recipe: original, static control and student over the seeds, into one folder.

Whatever can be wrong is looked for before anything is trained, and each result is written when it is there: a run
that was cut short goes on in its folder with what is missing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dyncompress import gradual
from dyncompress.allowance import SearchConfig
from dyncompress.arms import Arm, Score
from dyncompress.bundle import save
from dyncompress.callback import DynCompress
from dyncompress.checkpoint import load_weights
from dyncompress.conversion import convert
from dyncompress.cost import count_params, measure_macs
from dyncompress.errors import RecipeError
from dyncompress.evaluation import bank_bytes
from dyncompress.folding import fold
from dyncompress.latency import measure_latency
from dyncompress.loggers import LOGS, run_loggers, wandb_mode
from dyncompress.plan import Plan
from dyncompress.prediction import unchanged
from dyncompress.recipe import Recipe, importable
from dyncompress.report import Report
from dyncompress.search import told
from dyncompress.sensitivity import Progress
from dyncompress.subject import Subject, quiet
from dyncompress.tracking import log_report, log_search

# May differ from those that a folder was begun with: where results go and what they are called, and more seeds.
FREE = ("out", "name", "folder", "wandb", "seeds")
# What changes nothing: a folder that was begun before there were these keys goes on with them.
INERT = {"max_drop": None, "search": json.loads(json.dumps(asdict(SearchConfig()))), "narrowing_steps": 1}


def run_recipe(recipe: Recipe, console: Console | None = None) -> Report:
    """Train or load the original, plan, convert, fine-tune over the seeds, evaluate, report.

    The folder ends up with report.json, report.csv, tradeoff.png, plan.json, control.json, original.pt (where it was
    trained), student.safetensors (of the first seed, so that no test score chooses it), the metrics of every
    training, and the W&B runs. Run again on the same folder, it does only what is missing.

    Args:
        recipe: What to do.
        console: Where to tell about it; standard output by default.

    Returns:
        The report.

    Raises:
        DynCompressError: If the recipe cannot be run; nothing has been trained then.
    """
    console = console or Console()
    subject = Subject.of(recipe)
    subject.check()  # at the untrained weights: to fail now, if at all, and not after the training
    run = Run.begin(subject, console)
    with importable(recipe.folder), quiet(subject.lightning), torch_threads(recipe.threads):
        run.original()
        plans = run.plans()
        missing = run.missing(plans)
        for arm, seed in missing:
            with run.loggers(arm, seed) as loggers:
                run.finetune(arm, seed, plans[arm], loggers)
                if (arm, seed) == missing[-1]:
                    report = run.report(plans)
                    log_report(report, loggers, plans["student"])
        if not missing:
            report = run.report(plans)
    report.save(run.folder)
    console.print(report)
    files = sorted(path.name for path in run.folder.iterdir() if path.is_file())
    console.print(f"\nin {run.folder}: {', '.join(files)}", highlight=False)
    return report


@dataclass(frozen=True)
class Run:
    """A recipe at work in its folder.

    Attributes:
        subject: What is compressed.
        folder: Where results go.
        group: Name of all its trainings together.
        scores: Scores by arm and seed, as in scores.json.
        console: Where progress is told.
    """

    subject: Subject
    folder: Path
    group: str
    scores: dict[str, dict[str, float]]
    console: Console

    @classmethod
    def begin(cls, subject: Subject, console: Console) -> Run:
        """Open the folder, or begin it.

        Raises:
            RecipeError: If the folder holds the results of another recipe.
        """
        recipe = subject.recipe
        now = f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
        folder = Path(recipe.out) if recipe.out else Path("runs", recipe.name, now)
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / "recipe.json"
        asked = json.loads(json.dumps(recipe.to_dict()))
        if begun.exists():
            before = json.loads(begun.read_text("utf-8"))
            known = {**INERT, **before["recipe"]}
            odd = [key for key in asked if key not in FREE and known.get(key) != asked[key]]
            if odd:
                was, now_asked = known.get(odd[0]), asked[odd[0]]
                raise RecipeError(
                    f"{folder} was begun with another recipe: {odd[0]} was {was!r}, is {now_asked!r} - the same recipe "
                    "goes on where it stopped - choose another folder with --out, or remove this one"
                )
            group = before["group"]
        else:
            group = f"{recipe.name} {now}"
            _write_json(begun, {"group": group, "recipe": asked})
        results = folder / "scores.json"
        scores = json.loads(results.read_text("utf-8")) if results.exists() else {}
        run = cls(subject, folder, group, scores, console)
        mode, reason = wandb_mode()
        if recipe.wandb:
            where = f"; runs are kept in {folder / 'wandb'}" if mode == "offline" else ""
            console.print(f"W&B is {mode}: {reason}{where}", highlight=False)
        return run

    # ---- stages --------------------------------------------------------------------------------------------------

    def original(self) -> None:
        """Give the module its trained weights: from the checkpoint, from an earlier run, or by training it now."""
        subject, recipe = self.subject, self.subject.recipe
        weights, seed, started = self.folder / "original.pt", recipe.seeds[0], time.perf_counter()
        if recipe.baseline.checkpoint:
            if "original" not in self.scores:
                self._record("original", seed, subject.test(subject.model), 0, started)
        elif "original" in self.scores and weights.exists():
            load_weights(subject.network(subject.model), weights)
        else:
            with self.loggers("original", seed) as loggers:
                score = self._train("original", seed, subject.model, recipe.baseline.epochs, [], loggers)
                torch.save(subject.network(subject.model).state_dict(), weights)
                self._record("original", seed, score, recipe.baseline.epochs, started)

    def plans(self) -> dict[str, Plan]:
        """The plan of each arm: those in the folder, edited or not, else new ones."""
        paths = {"static": self.folder / "control.json", "student": self.folder / "plan.json"}
        if paths["student"].exists():
            plans = {arm: Plan.load(path) for arm, path in paths.items() if path.exists()}
        else:
            if self.subject.recipe.max_drop is not None:
                plans = self.subject.with_control(self.search())
            else:
                with self.console.status("planning") as status:
                    plans = self.subject.plans(telling(status))
            for arm, path in paths.items():
                if arm in plans:
                    plans[arm].save(path)
        self.console.print(plans["student"].table())
        return plans

    def search(self) -> Plan:
        """The cheapest plan within the recipe's ``max_drop``; scores of its trainings are kept in the folder."""

        def train(plan: Plan, epochs: int, seed: int) -> float:
            module = deepcopy(self.subject.model)
            with self._printing(f"search-{plan.target}-seed{seed}"):
                self._fit(seed, module, epochs, [self._callback(plan, seed)], False)
                return self.subject.validate(module)

        with told(self.console, "search") as progress:
            found = self.subject.cheapest(train, self.folder / "search", progress)
        self.console.print(found.table())
        with self.loggers("search", self.subject.recipe.seeds[0]) as loggers:
            log_search(found, loggers, 0)
            for logger in loggers:
                logger.save()  # no training does it
        return found.plan

    def missing(self, plans: dict[str, Plan]) -> list[tuple[str, int]]:
        """Arms and seeds without a score, the student of the last seed last."""
        arms = [arm for arm in ("static", "student") if arm in plans]
        wanted = [(arm, seed) for seed in self.subject.recipe.seeds for arm in arms]
        return [(arm, seed) for arm, seed in wanted if str(seed) not in self.scores.get(arm, {})]

    def finetune(self, arm: str, seed: int, plan: Plan, loggers: list[Any]) -> None:
        """Convert a copy of the original in the Trainer, distil it, score it."""
        subject, recipe, started = self.subject, self.subject.recipe, time.perf_counter()
        *before, last = gradual.lengths(recipe.epochs, recipe.narrowing_steps)
        module, plan = self._narrowed(arm, seed, plan, before)
        teacher = subject.network(subject.model) if before else None
        score = self._train(arm, seed, module, last, [self._callback(plan, seed, teacher)], loggers)
        if arm == "student" and seed == recipe.seeds[0]:
            save(subject.network(module), self.folder / "student.safetensors")
        self._record(arm, seed, score, recipe.epochs, started)

    def _narrowed(self, arm: str, seed: int, plan: Plan, lengths: list[int]) -> tuple[Any, Plan]:
        """A copy of the module, brought near a plan in trained steps of these lengths; the plan with its channels."""
        subject, left = self.subject, gradual.everything(plan)
        original, module = subject.network(subject.model), deepcopy(subject.model)
        for step, epochs in enumerate(lengths, 1):
            way = gradual.next_plan(subject.network(module), plan, left, step / (len(lengths) + 1))
            name, left = f"{arm}-step{step}", gradual.channels_of(way)
            with self.loggers(name, seed) as loggers:
                self._train(name, seed, module, epochs, [self._callback(way, seed, original)], loggers)
            wide = gradual.put_back(subject.network(module), original, way, subject.example)
            module = deepcopy(subject.model)
            subject.network(module).load_state_dict(wide.state_dict())
        return module, gradual.next_plan(subject.network(module), plan, left, 1) if lengths else plan

    def report(self, plans: dict[str, Plan]) -> Report:
        """Measure the networks against each other and put everything together."""
        subject, recipe = self.subject, self.subject.recipe
        original = subject.network(subject.model)
        nets = {arm: convert(original, plans[arm]) for arm in sorted(plans)}
        same = convert(original, unchanged(plans["student"].graph))
        # as they are shipped: what a folding costs or saves is no matter of the method
        folded = {"original": fold(same), **{arm: fold(net) for arm, net in nets.items()}}
        latency = measure_latency(folded, subject.example)
        arms = {
            arm: Arm(
                method=plans[arm].method,
                macs=measure_macs(nets[arm], subject.example),  # counted in the network, not quoted from the plan
                params=count_params(nets[arm]),
                score=self._score(arm),
                bank_bytes=bank_bytes(nets[arm]),
                latency=latency[arm],
            )
            for arm in plans
        }
        macs, params = measure_macs(original, subject.example), count_params(original)
        before = Arm("", macs, params, self._score("original"), 0, latency["original"])
        return Report(
            target=plans["student"].target,
            method=plans["student"].method,
            original=before,
            student=arms["student"],
            static=arms.get("static"),
            name=recipe.name,
            score_name=recipe.score,
            epochs=recipe.epochs,
        )

    # ---- one training --------------------------------------------------------------------------------------------

    def loggers(self, arm: str, seed: int) -> Any:
        """Loggers of one training; what an earlier attempt at it left is removed."""
        recipe, run = self.subject.recipe, f"{arm}-seed{seed}"
        shutil.rmtree(self.folder / LOGS / run, ignore_errors=True)
        config = {**recipe.to_dict(), "arm": arm, "seed": seed}
        return run_loggers(self.subject.lightning, self.folder, recipe.wandb, self.group, run, config)

    def _train(self, arm: str, seed: int, module: Any, epochs: int, callbacks: list[Any], loggers: list[Any]) -> float:
        """Train a module and give its score."""
        subject, label, started = self.subject, f"{arm:<9} seed {seed}", time.perf_counter()

        def tell(text: str) -> None:
            status.update(f"{label}  {text}  {time.perf_counter() - started:.0f} s")

        with self._printing(f"{arm}-seed{seed}"), self.console.status(label) as status:
            self._fit(seed, module, epochs, [*callbacks, progress(subject.lightning, tell)], loggers)
            return subject.test(module, logger=loggers)

    def _fit(self, seed: int, module: Any, epochs: int, callbacks: list[Any], loggers: Any) -> None:
        self.subject.lightning.seed_everything(seed)
        trainer = self.subject.trainer(max_epochs=epochs, logger=loggers, callbacks=callbacks)
        trainer.fit(module, self.subject.data)
        if trainer.interrupted:  # some releases of Lightning return after Ctrl-C as if all were well
            raise KeyboardInterrupt

    def _callback(self, plan: Plan, seed: int, teacher: Any = None) -> Any:
        recipe = self.subject.recipe
        return DynCompress(
            plan=plan,
            teacher=teacher,
            distill=recipe.distill,
            warmup=recipe.warmup,
            warm_start=recipe.warm_start,
            module=self.subject.path,
            seed=seed,
        )

    @contextmanager
    def _printing(self, name: str) -> Iterator[None]:
        """What a training prints goes to a file beside its metrics: the terminal has one line per training."""
        printed = self.folder / LOGS / f"{name}.txt"
        printed.parent.mkdir(exist_ok=True)
        with printed.open("w", encoding="utf-8") as file, redirect_stdout(file):
            yield

    def _record(self, arm: str, seed: int, score: float, epochs: int, started: float) -> None:
        """Write a score at once: the next arm may not come to its end."""
        self.scores.setdefault(arm, {})[str(seed)] = score
        _write_json(self.folder / "scores.json", self.scores)
        how = f"{epochs} epochs" if epochs else "from the checkpoint"
        seconds = time.perf_counter() - started
        name = self.subject.recipe.score
        self.console.print(f"{arm:<9} seed {seed}  {name} {score:.4f}  {how}  {seconds:.0f} s", highlight=False)

    def _score(self, arm: str) -> Score:
        return Score.of({int(seed): score for seed, score in self.scores[arm].items()})


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many CPU threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(lightning: Any, tell: Callable[[str], None]) -> Any:
    """A callback that tells epoch, and the metrics that the module puts into its progress bar."""

    class Progress(lightning.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items())
            tell(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}")

    return Progress()


def telling(status: Any) -> Progress:
    """Shows in a status line what a sensitivity map is at."""
    return lambda done, total, what: status.update(f"measuring sensitivity {done}/{total}  {what}")


def _write_json(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    part.replace(path)
