"""Distillation in a ``training_step`` that nobody edited.

The step is wrapped on the instance. While the user's code runs, the wrapper is off and the network's answers are
recorded; then the teacher answers the same inputs, and the distillation term joins the user's loss. Nothing stays on
the module: a hook that did would be copied with it, and under DDP would see the loss go by as if it were an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dyncompress.answers import answer_tensors, check_features, recorded
from dyncompress.conversion import plan_of
from dyncompress.distillation import DistillConfig, Kept, Teacher, features_loss, output_loss
from dyncompress.errors import DistillationError, shown
from dyncompress.graph import bare
from dyncompress.hints import kept_channels
from dyncompress.host import CONVOLUTIONS, has_convolutions
from dyncompress.patch import Patch
from dyncompress.schedules import progress


@dataclass(frozen=True)
class Forward:
    """One run of the network that gradients can flow back through."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any
    features: dict[str, Tensor]

    @property
    def batch_size(self) -> int:
        """Images in it."""
        return next(tensor.shape[0] for _, tensor in answer_tensors(self.answer))


class Watch:
    """Records every run of the network that gradients can flow back through, while its context lasts.

    Args:
        network: The network, as the user calls it.
        names: Modules in it whose features are recorded too.
    """

    def __init__(self, network: nn.Module, names: Collection[str]) -> None:
        self.forwards: list[Forward] = []
        self._network, self._names = network, names
        self._features: dict[str, Tensor] = {}
        # One and the same hook in every step, and opaque: a compiler around the step would trace each new one anew.
        self._hook = torch.compiler.disable(self._look)
        # A LightningModule's step may say self.forward(x), which no hook sees; a compiled step must not see a patch.
        self._by_forward = hasattr(network, "training_step") and getattr(network, "_compiler_ctx", None) is None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch until the context ends; hooks come and go with it."""
        with recorded(bare(self._network), self._names) as self._features, ExitStack() as stack:
            if self._by_forward:

                def forward(*args: Any, **kwargs: Any) -> Any:
                    answer = patch.original(*args, **kwargs)
                    self._look(self._network, args, kwargs, answer)
                    return answer

                patch = Patch(self._network, "forward", forward)
                stack.callback(patch.undo)
            else:
                stack.callback(self._network.register_forward_hook(self._hook, with_kwargs=True).remove)
            yield

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        features = dict(self._features)
        self._features.clear()
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(answer)):
            self.forwards.append(Forward(args, kwargs, _kept(answer), features))


def _kept(answer: Any) -> Any:
    """The answer, safe from a user's in-place operation on it."""
    if isinstance(answer, Tensor):
        return answer.clone()
    if isinstance(answer, Mapping):
        return {key: _kept(value) for key, value in answer.items()}
    if isinstance(answer, (tuple, list)):
        return [_kept(value) for value in answer]
    return answer


class TaughtStep:
    """A ``training_step`` with a teacher, until `undo`.

    Args:
        module: The LightningModule, attached to a Trainer whenever the step runs.
        network: The network in it, as the user calls it.
        teacher: Answers the network's inputs.
        config: What is added to the user's loss.

    Raises:
        DistillationError: If the features can't be recorded.
    """

    def __init__(self, module: Any, network: nn.Module, teacher: Teacher, config: DistillConfig) -> None:
        check_features(bare(network), config.modules)
        check_features(teacher.first, config.modules)
        if config.modules and (network is not bare(network) or vars(network).get("_compiled_call_impl")):
            raise DistillationError(
                f"features of {list(config.modules)} can't be seen inside a compiled network; leave out torch.compile,"
                " or distil the outputs only"
            )
        self._module, self._network, self._teacher, self._config = module, network, teacher, config
        self._watch = Watch(network, config.modules)
        self._kept: Kept | None = None
        self._labels: Tensor | None = None
        self._terms: list[Tensor] = []
        self._size = 0
        self._patch = Patch(module, "training_step", self._step)

    def undo(self) -> None:
        """Put the user's step back."""
        self._patch.undo()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # the user's validation_step calls it
            with self._patch.lifted() as step:
                return step(*args, **kwargs)
        automatic = self._module.automatic_optimization
        if self._config.labels is not None:
            self._labels = labels_of((*args, *kwargs.values())[0], self._config.labels)
        try:
            with ExitStack() as stack:
                step = stack.enter_context(self._patch.lifted())
                stack.enter_context(self._watch.on())
                if not automatic:
                    stack.enter_context(self._taught_backward())
                result = step(*args, **kwargs)
            if automatic:
                result = self._taught_result(result)
            if self._terms and not getattr(self._module.trainer, "barebones", False):
                term = torch.stack(self._terms).mean()
                self._module.log("distill/loss", term.detach(), batch_size=self._size)
            return result
        finally:
            self._watch.forwards.clear()  # no graph outlives its step
            self._terms.clear()
            self._labels = None

    def _taught_result(self, result: Any) -> Any:
        """The step's result with the term in its loss. Without a loss, Lightning skips the step, and so do we."""
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            return result
        if not self._watch.forwards:
            self._complain("call the network itself and not its layers, checkpoint it with use_reentrant=False")
        else:
            loss = self._add_term(loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    @contextmanager
    def _taught_backward(self) -> Iterator[None]:
        """Manual optimisation: the first backward after the network ran gets the term."""
        backwards = 0

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal backwards
            backwards += 1
            patch.original(self._add_term(loss) if self._watch.forwards else loss, *args, **kwargs)

        patch = Patch(self._module, "manual_backward", backward)
        try:
            yield
        finally:
            patch.undo()
        if not self._terms and (backwards or self._watch.forwards):
            self._complain("call the network itself and not its layers, and self.manual_backward after it")

    def _add_term(self, loss: Tensor) -> Tensor:
        term = torch.stack([self._term(forward) for forward in self._watch.forwards]).mean()
        self._size = self._watch.forwards[0].batch_size
        self._watch.forwards.clear()
        self._refuse_broken(loss, term)
        self._terms.append(term)
        return loss + term

    def _term(self, forward: Forward) -> Tensor:
        config = self._config
        parameter = next(self._network.parameters())
        self._teacher.follow(parameter.device, parameter.dtype)
        if config.hints and self._kept is None:  # only now is it sure by which plan the network was converted
            plan = plan_of(bare(self._network))
            first, (args, kwargs) = self._teacher.first, (forward.args, forward.kwargs)
            self._kept = {} if plan is None else kept_channels(first, args, kwargs, plan, config.hints)
        answer, features = self._teacher.answer(forward.args, forward.kwargs, config.modules)
        alpha, temperature = config.at(progress(self._module.trainer) if config.changes else 0.0)
        term = alpha * output_loss(forward.answer, answer, config, temperature, self._labels)
        if config.modules:
            term = term + features_loss(forward.features, features, config, self._kept)
        return term

    def _complain(self, remedy: str) -> None:
        if any(p.requires_grad for p in self._network.parameters()):  # a frozen one has nothing to learn
            children = self._module.named_children()
            inner = (n for n, c in children if has_convolutions(c) and not isinstance(c, CONVOLUTIONS))
            part = next(inner, None)
            if self._network is self._module and part:  # all of it runs in validation_step, and a part in training_step
                remedy += f"; where only a part of it is trained here, name that part: module={part!r}"
            raise DistillationError(
                f"training_step of {type(self._module).__name__} gave a loss, but its network"
                f" ({type(bare(self._network)).__name__}) did not run with gradients before it, so that nothing can be"
                f" distilled; {remedy}, or pass distill=False"
            )

    def _refuse_broken(self, loss: Tensor, term: Tensor) -> None:
        """A NaN spreads to all weights and stays. Reading a value makes an accelerator wait: not in every step."""
        trainer = self._module.trainer
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # 16-bit training overflows now and then; its scaler skips those steps
        if loss.device.type != "cpu" and trainer.global_step % max(trainer.log_every_n_steps, 1):
            return
        for name, value in (("the loss of training_step", loss), ("the distillation term", term)):
            if not value.isfinite().all():
                raise DistillationError(
                    f"{name} is {value.item()} in epoch {trainer.current_epoch}, step {trainer.global_step}; lower the"
                    " learning rate, clip gradients (gradient_clip_val), or look for the value in the batch"
                )


def labels_of(batch: Any, where: int | str) -> Tensor:
    """The classes in a training batch.

    Args:
        batch: What ``training_step`` is called with.
        where: Their index in a sequence, or key in a mapping.

    Raises:
        DistillationError: If there is no tensor; says what the batch is.

    Example:
        >>> labels_of([torch.zeros(2, 3, 8, 8), torch.tensor([4, 1])], 1)
        tensor([4, 1])
    """
    try:
        labels = batch[where]
    except (LookupError, TypeError):
        labels = None
    if isinstance(labels, Tensor):
        return labels
    entries = batch if isinstance(batch, (Mapping, tuple, list)) else ()
    inside = list(entries) if isinstance(entries, Mapping) else [type(entry).__name__ for entry in entries]
    raise DistillationError(
        f"labels={shown(where)} finds no tensor in the training batch, a {type(batch).__name__} of {inside}; give the"
        " index or the key of the classes, or leave labels out: the teacher's first choice is the target then"
    )
