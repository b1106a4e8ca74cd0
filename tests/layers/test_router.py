"""A block's layers share one squeezed input: it reaches each reader once, and nothing of it stays behind."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyNet
from dyncompress.layers.router import Handover


class Block(nn.Module):
    """A residual block with a projection, whose three layers run in the order: first, second, shortcut."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        specs = [ConvSpec(6, 8, (3, 3), padding=(1, 1)), ConvSpec(8, 8, (3, 3), padding=(1, 1)), ConvSpec(6, 8, (1, 1))]
        layers = DyNet(g=3, **options).build([ConvSite("conv", spec, positions=36) for spec in specs])
        self.first, self.second, self.shortcut = layers
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.shortcut(x)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 6, 6, 6)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


# Handing over


def test_each_reader_takes_once() -> None:
    handover, x = Handover(readers=2), torch.zeros(3, 8)
    description = torch.ones(3, 6)
    handover.put(description)
    assert handover.take(1, x) is description
    assert handover.take(0, x) is description
    for reader in (0, 1):
        with pytest.raises(DynCompressError, match=r"no coefficients wait .*router='layer'"):
            handover.take(reader, x)


def test_a_new_run_replaces_what_was_not_read() -> None:
    handover, x = Handover(readers=2), torch.zeros(3, 8)
    handover.put(torch.ones(3, 6))
    handover.take(0, x)
    handover.put(torch.full((3, 6), 2.0))
    assert [handover.take(reader, x).max() for reader in (0, 1)] == [2, 2]


def test_another_batch_is_refused() -> None:
    handover = Handover(readers=1)
    handover.put(torch.ones(3, 6))
    with pytest.raises(DynCompressError, match=r"a batch of 3 on cpu, this layer 2 on cpu.*router='layer'"):
        handover.take(0, torch.zeros(2, 8))


def test_another_device_is_refused() -> None:
    handover = Handover(readers=1)
    handover.put(torch.ones(3, 6))
    with pytest.raises(DynCompressError, match="3 on cpu, this layer 3 on meta"):
        handover.take(0, torch.zeros(3, 8, device="meta"))


def test_threads_do_not_see_each_other() -> None:
    block = Block()
    batches = [images() for _ in range(4)]
    expected = [block(x) for x in batches]
    together, results = threading.Barrier(len(batches)), {}

    def run(index: int) -> None:
        hidden = block.first(batches[index]).relu()
        together.wait()  # all have written, none has read
        results[index] = block.second(hidden) + block.shortcut(batches[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Not to the last bit: another thread may have other settings of torch, and sum in another order.
    assert all(torch.allclose(results[index], wanted, atol=1e-6) for index, wanted in enumerate(expected))


# Blocks


def test_layers_that_are_skipped_repeated_or_alone_are_refused() -> None:
    block, x = Block(), images()
    with pytest.raises(DynCompressError, match="no coefficients wait"):
        block.shortcut(x)
    block(x)
    block.first(x)
    block.shortcut(x)
    with pytest.raises(DynCompressError, match="no coefficients wait"):
        block.shortcut(x)
    alone = Block(router="layer")
    assert alone.shortcut(x).shape == alone.second(alone.first(x)).shape


def test_a_failed_run_leaves_no_trace() -> None:
    block, x = Block(), images()
    expected = block(x)
    block.first(images(5))
    assert torch.equal(block(x), expected)


class Marked(torch.autograd.Function):
    """The identity, whose node in the graph keeps a marker alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: object) -> Tensor:
        ctx.marker = marker
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def test_no_graph_outlives_its_step() -> None:
    block, leaf = Block(), images().requires_grad_()

    def graph_lives_on(run: Callable[[Tensor], Tensor]) -> bool:
        marker = type("Marker", (), {})()
        run(Marked.apply(leaf, marker))
        alive = weakref.ref(marker)
        del marker
        gc.collect()
        return alive() is not None

    assert graph_lives_on(block.first)  # the others have not read yet
    assert not graph_lives_on(block)


def test_a_copy_shares_its_own_object() -> None:
    block, x = Block(), images()
    block.first(x)  # something waits
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        shared = {id(layer.handover) for layer in (other.first, other.second, other.shortcut)}
        assert len(shared) == 1
        assert other.first.handover is not block.first.handover
        with pytest.raises(DynCompressError, match="no coefficients wait"):
            other.shortcut(x)
    assert block.shortcut(x).shape == (3, 8, 6, 6)  # what waited is still the original's


def test_interleaved_copies_do_not_mix() -> None:
    block, x = Block(), images()
    other, expected = copy.deepcopy(block), block(x)
    hidden = block.first(x)
    other(images())
    assert torch.equal(block.second(hidden.relu()) + block.shortcut(x), expected)


@pytest.mark.parametrize("reduction", [0, 2])
def test_a_reader_teaches_through_the_input_of_the_first(reduction: int) -> None:
    block, x = Block(reduction=reduction), images().requires_grad_()
    block.first(x)
    (gradient,) = torch.autograd.grad(block.shortcut(x.detach()).sum(), x)
    # Only through the mean over positions, so it is the same at all 36 of them.
    assert gradient.any()
    torch.testing.assert_close(gradient, gradient.mean((2, 3), keepdim=True).expand_as(gradient))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    block, x = Block(reduction=2), images().requires_grad_()
    block(x).square().sum().backward()
    expected = gradients(block)
    result = checkpoint(block, x, use_reentrant=reentrant)
    result.square().sum().backward()
    for name, gradient in gradients(block).items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(expected) == 3 * 4 + 2  # bank, bias, router.weight and .bias of each; the squeeze's of the first


def test_checkpointing_layer_by_layer_says_what_to_do() -> None:
    block, x = Block(), images()
    hidden = checkpoint(block.first, x, use_reentrant=False)
    output = checkpoint(block.second, hidden, use_reentrant=False)
    with pytest.raises(DynCompressError, match="checkpointed or compiled one by one"):
        output.sum().backward()


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_quiet_runs_between_steps_change_nothing(quiet: Any) -> None:
    block, x = Block(), images()
    block(x).sum().backward()
    expected = gradients(block)
    with quiet():
        block(images(2))
    block(x).sum().backward()
    for name, gradient in gradients(block).items():
        assert torch.equal(gradient, expected[name])
