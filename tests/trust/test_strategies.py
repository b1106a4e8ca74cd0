"""Strategies: several processes train one network, whichever way they are started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dyncompress.checkpoint import load_from_checkpoint, read_plan
from dyncompress.conversion import plan_of
from dyncompress.distillation import fingerprint
from dyncompress.errors import CheckpointError
from tests.classifiers import classifier, loader
from tests.taught import difference
from tests.trust.jobs import CONFIGS, gradients, whole
from tests.trust.launch import TORCHRUN, launch, succeed

Record = Callable[[str, object], None]


def pair(told: dict[str, Any], name: str = "rank") -> tuple[Any, Any]:
    return told[f"{name}0"], told[f"{name}1"]


# ---- one decision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["lightning", "torchrun"])
def test_processes_that_start_apart_end_with_one_network(
    by: tuple[str, ...], tmp_path: Path, record_property: Record
) -> None:
    """Under DDP all processes get one plan, one teacher and one set of weights, even where each seeded differently."""
    zero, one = pair(succeed("agree", tmp_path, by=by))
    assert zero["before"] != one["before"]
    for fact in ("after", "plan", "told", "teacher"):
        assert zero[fact] == one[fact], fact
    assert zero["teacher"] == zero["told"] == zero["before"]  # rank 0's original teaches both
    assert zero["after"] != zero["before"]
    assert zero["steps"] == 2  # four batches, two processes
    assert min(zero["term"], one["term"]) > 0
    record_property("figure", "2 processes, equal to the last bit")


@pytest.mark.slow
def test_gradients_under_ddp_are_those_of_the_whole_batch(tmp_path: Path, record_property: Record) -> None:
    """Distilling in two processes, each on half of a batch, gives the gradient of one process on all of it."""
    succeed("share_gradients", tmp_path)
    alone = {name: gradients(1, config) for name, config in CONFIGS.items()}
    apart = 0.0
    for name, found in alone.items():
        assert any("bank" in key for key in found) and any("router" in key for key in found)
        for rank in (0, 1):
            shared = torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True)
            apart = max(apart, difference(found, shared).abs().max().item())
    assert apart <= 1e-5
    for key in alone["none"]:  # the term reaches every parameter, banks and routers included
        assert not torch.equal(alone["outputs"][key], alone["none"][key]), key
    term, others = (
        difference(alone["outputs"], alone["none"]).norm(),
        difference(alone["features"], alone["none"]).norm(),
    )
    assert min(term, others) > 1e-2
    record_property("figure", f"largest difference {apart:.1e}; the term's own gradient has norm {term:.2g}")


# ---- checkpoints under DDP ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compressed_checkpoint_serves_every_stage_under_ddp(tmp_path: Path, record_property: Record) -> None:
    """Under DDP a compressed checkpoint is resumed, validated, tested and predicted from, whatever else was built."""
    told = succeed("save_and_use", tmp_path)
    zero, one = pair(told)
    for facts in (zero, one):
        assert facts["saved"] == facts["validate"] == facts["test"] == facts["predict"]
        assert facts["start"] == facts["parameters"]
        assert (facts["step"], facts["steps"]) == (2, 4)
        assert facts["term"] > 0
    assert zero["end"] == one["end"] != zero["saved"]
    alone = load_from_checkpoint(classifier(), tmp_path / "ddp.ckpt").eval()
    with torch.no_grad():
        expected = torch.cat([alone(x) for x, _ in loader(2)])
    parts = [torch.load(tmp_path / f"predicted.{rank}.pt", weights_only=True) for rank in (0, 1)]
    apart = max((part - expected[rank::2]).abs().max().item() for rank, part in enumerate(parts))
    assert len(parts[0]) + len(parts[1]) == len(expected)
    assert apart <= 1e-5
    record_property("figure", f"weights equal to the last bit; predictions within {apart:.1e} of one process's")


# ---- FSDP2 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a full and a sharded checkpoint of one epoch, and what their processes told."""
    folder = tmp_path_factory.mktemp("split")
    return folder, succeed("shard_and_save", folder)


@pytest.mark.slow
def test_a_split_network_is_compressed_and_taught(split: tuple[Path, dict[str, Any]], record_property: Record) -> None:
    """With FSDP2 (ModelParallelStrategy) every process holds a part of the converted network, taught as one."""
    told = split[1]
    for name in ("full.", "folder."):
        zero, one = pair(told, name)
        for fact in ("weights", "plan", "teacher"):
            assert zero[fact] == one[fact], fact
        assert zero["steps"] == 2
        assert min(zero["term"], one["term"]) > 0
        assert zero["full"] == zero["local"] + one["local"] and min(zero["local"], one["local"]) > 0
    record_property("figure", f"{zero['full']} weights, {zero['local']} in one process and {one['local']} in the other")


@pytest.mark.slow
def test_split_checkpoints_resume(split: tuple[Path, dict[str, Any]], record_property: Record) -> None:
    """With FSDP2 a full and a sharded checkpoint resume in new processes; another target is refused, plan= is taken."""
    folder, before = split
    told = succeed("shard_and_resume", folder)
    for name in ("full", "folder"):
        for facts in pair(told, f"resumed.{name}."):
            assert facts["start"] == facts["by_plan"] == before[f"{name}.0"]["weights"]
            assert (facts["step"], facts["steps"]) == (2, 4)
            assert facts["term"] > 0
            assert facts["end"] == facts["uninterrupted"] != facts["start"]
            assert "ModelParallelStrategy has split the module" in facts["refused"]
            assert "pass plan=<the checkpoint>" in facts["refused"]
    record_property("figure", "weights equal to the last bit, and after another epoch to those of a run never stopped")


@pytest.mark.slow
def test_split_checkpoints_are_read_in_one_process(split: tuple[Path, dict[str, Any]], record_property: Record) -> None:
    """What FSDP2 saved opens without it: a full checkpoint as a module, a sharded one by its plan."""
    folder, told = split
    plan = told["full.0"]["plan"]
    module = load_from_checkpoint(classifier(), folder / "full.ckpt")
    assert fingerprint(whole(module)) == told["full.0"]["weights"]
    assert plan_of(module).to_json() == plan
    assert (folder / "folder.ckpt").is_dir()
    assert read_plan(folder / "folder.ckpt").to_json() == read_plan(folder / "full.ckpt").to_json() == plan
    with pytest.raises(CheckpointError, match=r"a checkpoint in pieces.*save_distributed_checkpoint=False"):
        load_from_checkpoint(classifier(), folder / "folder.ckpt")
    record_property("figure", "weights equal to the last bit")


@pytest.mark.slow
def test_a_network_that_is_split_before_it_can_be_converted_is_refused(tmp_path: Path, record_property: Record) -> None:
    """A network that is built and split in one hook is refused on every process, with where to build it instead."""
    run = launch("shard_lazily", tmp_path)
    assert run.returncode != 0
    for facts in pair(run.told):
        assert "are split over processes already" in facts["message"]
        assert "build it in __init__ or setup" in facts["message"]
    record_property("figure", f"over in {run.seconds:.0f} s")


# ---- processes that are started from one -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_started_from_one_train_what_was_attached(
    strategy: str, tmp_path: Path, record_property: Record
) -> None:
    """Spawned, forked and notebook processes train what attach() converted, and hand it back."""
    told = succeed("start_others", tmp_path, strategy)
    main = told["main"]
    assert main["fingerprint"] == told["worker0"]["fingerprint"] == told["worker1"]["fingerprint"] != main["start"]
    assert min(told["worker0"]["term"], told["worker1"]["term"]) > 0
    assert 0.49 < main["ratio"] < 0.505
    # A later run here that fails before its first step leaves what was trained there.
    assert "is nan" in main["problem"]
    assert main["later_parameters"] == main["parameters"]
    record_property("figure", "weights equal to the last bit")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_what_started_processes_could_not_hand_back_is_refused(strategy: str, tmp_path: Path) -> None:
    """Without attach(), or resumed with another plan, such processes refuse before they train; the module stays."""
    told = succeed("start_others_wrongly", tmp_path, strategy)
    assert "callback.attach(model, example) before trainer.fit" in told["refused"]["message"]
    assert told["refused"]["untouched"]
    assert "pass plan=<the checkpoint>" in told["other_plan"]["message"]


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_of_one_process_is_raised_in_all(tmp_path: Path, record_property: Record) -> None:
    """What only the first process can find out, an unreachable target say, is raised in all with the same words."""
    run = launch("ask_too_much", tmp_path)
    zero, one = pair(run.told)
    assert run.returncode != 0
    assert zero == one
    assert zero["kind"] == "BudgetError"
    assert "0.01%" in zero["message"]
    record_property("figure", f"both processes over in {run.seconds:.0f} s, start included")


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["0", "1", "01"])
def test_a_teacher_file_is_read_by_one_process_for_all(lacking: str, tmp_path: Path, record_property: Record) -> None:
    """A teacher's file has to be there for the first process only; if it is not, all say so."""
    run = launch("miss_the_teacher", tmp_path, lacking)
    zero, one = pair(run.told)
    assert zero == one
    assert (run.returncode == 0) == ("teacher" in zero) == (lacking == "1"), json.dumps(zero)
    if lacking != "1":
        assert zero["kind"] == "CheckpointError" and "there is no file" in zero["message"]
    record_property("figure", f"missing in {' and '.join(lacking)}: over in {run.seconds:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["0", "1"])
def test_an_error_in_one_process_ends_all(where: str, tmp_path: Path, record_property: Record) -> None:
    """A loss that is not a number in one process only ends the training in all: its error is printed, nobody waits."""
    run = launch("meet_nan", tmp_path, where)
    assert run.returncode != 0
    assert run.told[f"rank{where}"]["kind"] == "DistillationError"
    assert "is nan in epoch 0, step 1" in run.told[f"rank{where}"]["message"]
    assert run.told[f"rank{where}"]["message"] in run.output
    record_property("figure", f"in process {where}: both over in {run.seconds:.0f} s, start included")
