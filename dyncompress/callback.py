"""Compression inside ``Trainer.fit``: one callback, and no edit to the LightningModule.

=========================  ==============================================================================
``setup``                  find the network, plan, keep a teacher, convert, wrap ``training_step``
``on_load_checkpoint``     (the module's) a checkpoint's plan decides: rebuild before its weights are loaded
``on_fit_start``           check the optimizers, log what was decided
``on_train_start``         check a resumed run's teacher; BatchNorm statistics of the narrowed network
``on_train_batch_start``   tell the layers how much of the training is over
``teardown``, on an error  take every patch off; the converted layers stay
=========================  ==============================================================================

The network has the shapes of its plan before optimizers, DDP or FSDP see it. The teacher is held here and nowhere
else: in no state dict of the module, no optimizer, no DDP bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torch import nn
from typing_extensions import override

from dyncompress.allowance import Drop, SearchConfig
from dyncompress.budget import Budget, Target
from dyncompress.checkpoint import read_plan
from dyncompress.compensation import WarmStart
from dyncompress.conversion import plan_of, recalibrate, resolve
from dyncompress.distillation import DistillConfig, Teacher, fingerprint
from dyncompress.errors import DistillationError, DynCompressError, PlanError, SearchError, TraceError, shown
from dyncompress.graph import bare
from dyncompress.host import (
    NotYetError,
    check_optimizers,
    find_network,
    from_rank_zero,
    is_split,
    overrides,
    refuse_copies,
    refuse_spawned,
    refuse_split,
)
from dyncompress.inputs import example_of, placed, training_inputs
from dyncompress.patch import Patch
from dyncompress.plan import Plan
from dyncompress.planning import asked_method, check_shares, make_plan
from dyncompress.presets import find_preset
from dyncompress.probing import search_in_fit
from dyncompress.restoring import careful_loading, follow, plans_of
from dyncompress.schedules import anneal, check_warmup, hold, progress
from dyncompress.search import Found
from dyncompress.student import Student
from dyncompress.teachers import Given, check_teacher, known_teacher, listed, load_teacher
from dyncompress.teaching import TaughtStep
from dyncompress.tracking import log_plan, log_search, log_summary, reached

_PACKAGES = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
if not _PACKAGES:
    raise ImportError("DynCompress needs PyTorch Lightning; install it with `pip install pytorch-lightning`")
# LightningCLI takes only its own package's Callback. A class that is both is taken by both.
_BASES: Any = [import_module(f"{name}.callbacks").Callback for name in _PACKAGES]


class DynCompress(*_BASES):  # type: ignore[misc]
    """Narrow a network to a target, make its convolutions dynamic, and train it against the original.

    Args:
        target: Share of the original's MACs (``0.33``, ``"33%"``), or an absolute cost, or several limits
            (``"33%, 50% params"``); see `make_plan`.
        method: Registered name of the dynamic convolution, or ``"static"``: the control arm; ``"auto"`` by default.
        preset: Name of a paper's network, such as ``"dy-resnet18"``, instead of a method; its widths are those of the
            paper where there is no target. See `make_plan`.
        options: The method's options.
        plan: Instead of a target: a plan, its JSON file, or a checkpoint that holds one.
        teacher: Weights of the original network (``.ckpt``, ``.pt``, ``.safetensors``), another network with the
            same outputs, or a list of these, whose softened answers are averaged. By default the network as it is when
            training starts.
        distill: How the student learns; False for no teacher.
        module: Name of the network in the LightningModule, where there are several; ``""`` is the LightningModule.
        example: What the network's ``forward`` takes. By default it is seen in the first training batch.
        allocation: How widths are found: ``"uniform"`` or ``"importance"``; see `make_plan`. For ``"sensitivity"``,
            which takes measurements, make the plan yourself and pass it as ``plan``.
        importance: Which channels stay: ``"magnitude"`` or ``"bn"``. For ``"taylor"``, which takes data, likewise.
        ignore: Layers to leave alone; see `make_plan`.
        static: Layers to narrow and leave static; see `make_plan`.
        floors: What layers keep of their width at least; see `make_plan`.
        warm_start: What the student is before it is trained: ``"ridge"``: its layers are fitted to the original's,
            ``"plain"``: it has the weights of the kept channels; or a `WarmStart`.
        recalibrate: Training batches that the warm start and BatchNorm statistics are estimated on before training
            starts; 0 for none, so that weights and statistics are those of the kept channels.
        warmup: Part of the training, 0.2 say, in which layers become dynamic: each starts static, and what its
            coefficients make of the input is scaled by a share that rises from 0 to 1; see `schedules.hold`.
        save_teacher: Put the teacher's weights into the checkpoints, so that a resumed run finds it there.
        seed: Of what tells the kernels of a dynamic layer apart.
        max_drop: Instead of a target: points of the validation score that may be lost, ``1.0`` say (`Drop`). The
            cheapest network within them is searched with short trainings before this one (docs/max_drop.md).
        search: How: which score, how long to train, when to stop; a `SearchConfig`.

    Raises:
        DynCompressError: If a value is out of its range, or there is neither target nor plan.

    Example:
        >>> callback = DynCompress(target="33%")
        >>> callback.method, callback.distill.temperature
        ('auto', 4.0)
    """

    def __init__(
        self,
        target: Target | None = None,
        *,
        method: str | None = None,
        preset: str | None = None,
        options: dict[str, Any] | None = None,
        plan: str | Path | Plan | None = None,
        teacher: Given = None,
        distill: bool | DistillConfig = True,
        module: str | None = None,
        example: Any = None,
        allocation: str = "uniform",
        importance: str = "magnitude",
        ignore: Sequence[str] = (),
        static: Sequence[str] = (),
        floors: Mapping[str, int | float] | None = None,
        warm_start: str | WarmStart = "ridge",
        recalibrate: int = 8,
        warmup: float = 0.0,
        save_teacher: bool = False,
        seed: int = 0,
        max_drop: float | str | None = None,
        search: SearchConfig | None = None,
    ) -> None:
        super().__init__()
        self.max_drop = Drop.alone(max_drop, target=target, plan=plan, preset=preset)
        self.search, self.found = search or SearchConfig(), cast("Found | None", None)
        paper = None if preset is None else find_preset(preset)
        if target is None and plan is None and paper is None and max_drop is None:
            raise PlanError("DynCompress has neither target nor plan; give target='33%', say, or plan= a file")
        if plan is not None and paper is not None:
            raise PlanError(f"preset {shown(preset)} is given beside a plan, which says it all; leave one of them out")
        if target is not None:
            Budget.parse(target)
        searched = max_drop is not None and allocation == "sensitivity"  # then there are data to measure it
        check_shares("uniform" if searched else allocation, importance, measured=False)
        chosen = asked_method(method, options, paper)
        if isinstance(recalibrate, bool) or not isinstance(recalibrate, int) or recalibrate < 0:
            raise DynCompressError(
                f"recalibrate {shown(recalibrate)} is no number of batches; 8 is usual, 0 leaves it out"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise DynCompressError(f"seed {shown(seed)} is no number from 0 to 2**63 - 1; 0 is as good as any")
        if not isinstance(distill, (bool, DistillConfig)):
            raise DistillationError(
                f"distill {shown(distill)} does not say how; give True, False, or DistillConfig(temperature=4.0)"
            )
        check_warmup(warmup)
        listed(teacher)
        self.warmup = warmup
        self.target, self.method, self.preset, self.options, self.plan = target, chosen.name, preset, options, plan
        self.shape: dict[str, Any] = {
            "allocation": allocation, "importance": importance, "ignore": ignore, "static": static, "floors": floors
        }  # fmt: skip
        self.seed, self.warm_start = seed, WarmStart.of(warm_start).within(recalibrate, warmup)
        self.distill = (DistillConfig() if distill else None) if isinstance(distill, bool) else distill
        self.teacher, self.save_teacher = teacher, save_teacher
        self.module, self.example, self.recalibrate = module, example, recalibrate
        self._student: Student | None = None
        self._teacher: Teacher | None = None
        self._patches: list[Patch | TaughtStep] = []
        self._restored: dict[str, Any] = {}
        self._attached = ""

    def attach(self, model: Any, example: Any = None) -> None:
        """Convert now, before ``trainer.fit``.

        Needed with strategies that train in processes started from this one (``ddp_spawn``, ``ddp_fork``,
        ``ddp_notebook``); with others it does no harm.

        Args:
            model: The LightningModule.
            example: What its network's ``forward`` takes; by default ``model.example_input_array``.
        """
        self.example = self.example if example is None else example
        self._compress(None, model)
        assert self._student is not None
        self._attached = fingerprint(self._student.inner)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert when training is about to start; in every stage, see to it that compressed checkpoints load."""
        self._undo()
        self._restored = {}
        if self._attached and self._student is not None and fingerprint(self._student.inner) != self._attached:
            self._student.settle()  # trained in other processes, where the hooks ran that would have said so here
        try:
            self._patches.append(
                Patch.before(pl_module, "on_load_checkpoint", partial(self._rebuild, trainer, pl_module))
            )
            self._patches.append(careful_loading(trainer, pl_module))
            if stage == "fit":
                self._compress_when_built(trainer, pl_module)
        except BaseException:
            self._undo()
            raise

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint says, for when everything is restored."""
        self._restored = state_dict

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plan, fingerprint of the teacher and, if asked, its weights: plain values and tensors."""
        plan = self._student.plan if self._student is not None else None
        if plan is None:
            return {}
        state: dict[str, Any] = {"plan": plan.to_json()}
        if self._teacher is not None:
            state["teacher"] = self._teacher.fingerprint
            if self.save_teacher:
                state["teacher_weights"] = dict(self._teacher.network.state_dict())
        return state

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the optimizers hold the new parameters; tell what was decided."""
        assert self._student is not None and self._student.plan is not None
        check_optimizers(trainer, self._student.inner, self._student.path)
        if trainer.is_global_zero:
            settings = {"distill": asdict(self.distill) if self.distill else False, "seed": self.seed}
            log_plan(trainer.loggers, self._student.plan, settings, trainer.global_step)
            if self.found is not None:
                log_search(self.found, trainer.loggers, trainer.global_step)
            trainer.print(self._told(self._student.plan))

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compare the teacher with the checkpoint's; where nothing was trained yet, see to a good start."""
        assert self._student is not None
        check_teacher(self._teacher, self.teacher, self._restored, trainer.print)
        wanted = self.recalibrate and (self._student.has_norms or self.warm_start.fit != "plain")
        if wanted and self._student.original is not None and trainer.global_step == 0:
            try:
                inputs = training_inputs(trainer, pl_module, self._student.network, self.recalibrate)
            except TraceError as error:
                trainer.print(f"DynCompress: the student starts with the original's weights and statistics; {error}")
            else:
                if inputs:
                    self._start(trainer, inputs)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Tell the layers how much of the training is over, for those that have a schedule."""
        assert self._student is not None
        if self.warmup and self._student.original is not None and trainer.global_step == 0:
            hold(self._student.inner)  # what gave it a better start may have let go
        anneal(self._student.inner, progress(trainer), self.warmup)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """From here on there is no way back to the original."""
        assert self._student is not None
        self._student.settle()

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the result where runs are compared."""
        if trainer.is_global_zero and self._student is not None and self._student.plan is not None:
            scored = [c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None]
            best = {c.monitor: float(c.best_model_score) for c in scored}
            log_summary(trainer.loggers, self._student.plan, best)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no patch behind, and no teacher on an accelerator."""
        self._undo()
        if self._teacher is not None:
            self._teacher.network.cpu()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no patch behind; where dyncompress itself gives up before the first step, leave nothing behind."""
        ours = isinstance(exception, DynCompressError) and trainer.state.fn == "fit"
        if ours and self._student is not None and self._student.original is not None:
            self._student.revert()
            self._student = self._teacher = None
        self._undo()

    # ---- conversion ----------------------------------------------------------------------------------------------

    def _compress_when_built(self, trainer: Any, module: Any) -> None:
        """Convert now, or after the hook of the LightningModule that builds its network or opens its data."""
        try:
            self._compress(trainer, module)
        except NotYetError as error:
            if self.max_drop is not None:
                raise SearchError(f"max_drop trains copies of the module, and this is too early: {error}") from error
            # A patch looks like what it replaces, so Lightning would skip one on a hook that is not overridden.
            later = [name for name in ("setup", "configure_model") if overrides(module, name)]
            if not later:
                raise
            for name in later:
                again = partial(self._compress_if_built, trainer, module, last=name == later[-1])
                self._patches.append(Patch.after(module, name, again))

    def _compress_if_built(self, trainer: Any, module: Any, last: bool) -> None:
        try:
            self._compress(trainer, module)
        except NotYetError:
            if last:
                raise

    def _compress(self, trainer: Any, module: Any) -> None:
        """Convert the module's network unless it is converted, and have it taught unless it is."""
        path, network = find_network(module, self.module)
        if plan_of(bare(network)) is None:
            if trainer is not None:
                refuse_split(bare(network), path)
                refuse_spawned(trainer)
                refuse_copies(trainer, module, self)
            student = Student(path, network)
            plan = from_rank_zero(trainer, lambda: self._decide(trainer, module, network))
            teacher = load_teacher(self.teacher, student, trainer) if self.distill else None
            student.convert(plan, self.seed)
            if self.warmup:
                hold(student.inner)
            self._student, self._teacher = student, teacher
        elif self._student is None or self._student.inner is not bare(network):
            self._take_over(Student(path, network))
        else:
            self._student.network = network  # it may have been compiled since
        taught = any(isinstance(patch, TaughtStep) for patch in self._patches)
        if trainer is not None and self._teacher is not None and self.distill and not taught:
            self._patches.append(TaughtStep(module, network, self._teacher, self.distill))

    def _decide(self, trainer: Any, module: Any, network: nn.Module) -> Plan:
        inner = bare(network)
        if isinstance(self.plan, Plan):
            plan = self.plan
        elif self.plan is not None:
            plan = read_plan(self.plan)
        else:
            example = example_of(trainer, module, network) if self.example is None else placed(self.example, network)
            how: dict[str, Any] = {"method": self.method} if self.preset is None else {"preset": self.preset}
            how |= {"options": self.options, **self.shape}
            if self.max_drop is not None:
                self.found = search_in_fit(trainer, module, self, example, how)
                trainer.print(f"DynCompress: {self.found.why}")
                return resolve(inner, self.found.plan)
            plan = make_plan(inner, example, self.target, **how)
        return resolve(inner, plan)

    def _start(self, trainer: Any, inputs: list[Any]) -> None:
        """Give the untrained student its warm start, the same on every rank."""
        student = self._student
        assert student is not None and student.original is not None
        if self.warm_start.fit == "plain" or is_split(trainer, student.inner):
            if self.warm_start.fit != "plain":
                trainer.print("DynCompress: weights are split over processes, so that the warm start is 'plain'")
            recalibrate(student.inner, inputs)
            return
        inputs = placed(inputs, student.original.to(next(student.inner.parameters()).device))
        student.inner.load_state_dict(
            from_rank_zero(trainer, lambda: student.started(inputs, self.warm_start, self.seed))
        )

    def _take_over(self, student: Student) -> None:
        """Go on with a network that somebody else converted."""
        assert student.plan is not None
        if self.target is not None and self.plan is None and str(Budget.parse(self.target)) != student.plan.target:
            raise PlanError(
                f"the network is converted already, to {student.plan.target}, and the callback asks for {self.target};"
                " build the original network anew, or ask for the same target"
            )
        self._teacher = known_teacher(self.teacher) if self.distill else None
        self._student = student

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _rebuild(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Bring the module into the shapes of a checkpoint, before its weights are loaded."""
        follow(plans_of(checkpoint, module, self.module), trainer, module, self._student, self, self.seed)

    # ---- the rest ------------------------------------------------------------------------------------------------

    def _told(self, plan: Plan) -> str:
        asked = plan.target if self.target is None or self.plan is not None else str(Budget.parse(self.target))
        other = "" if asked == plan.target else f" (a checkpoint's plan for {plan.target} decides)"
        return f"DynCompress: asked {asked}{other}, reached {reached(plan)} with {plan.method}"

    def _undo(self) -> None:
        while self._patches:
            self._patches.pop().undo()
