"""Two processes: one decision, one teacher, one student. In processes of their own, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROLOGUE = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dyncompress import DynCompress
from dyncompress.conversion import plan_of
from dyncompress.distillation import fingerprint
from tests.classifiers import classifier, loader, trainer

def tell(name, **facts):
    Path(sys.argv[1], name).write_text(json.dumps(facts))
"""

DDP = """
rank = int(os.environ.get("LOCAL_RANK", 0))
torch.manual_seed(rank)  # every process builds other weights, so that left alone they would choose other channels
module, callback = classifier()(), DynCompress("50%")
before = fingerprint(module.net)
host = trainer(callbacks=[callback], strategy="ddp", devices=2)
host.fit(module, loader(), loader(1))
tell(f"rank{rank}", before=before, after=fingerprint(module), plan=plan_of(module).to_json(),
     told=callback.state_dict()["teacher"], teacher=fingerprint(callback._teacher.network),
     term=host.callback_metrics["distill/loss"].item(), steps=host.global_step)
"""

SPAWNED = """
class Tell(__import__("lightning.pytorch").pytorch.Callback):
    def on_train_end(self, trainer, pl_module):
        tell(f"worker{trainer.global_rank}", fingerprint=fingerprint(pl_module),
             term=trainer.callback_metrics["distill/loss"].item())

if __name__ == "__main__":
    torch.manual_seed(0)
    module, callback = classifier()(), DynCompress("50%")
    callback.attach(module, torch.zeros(1, 3, 8, 8))
    host = trainer(callbacks=[callback, Tell()], strategy="ddp_fork", devices=2)
    host.fit(module, loader(), loader(1))
    tell("main", fingerprint=fingerprint(module), macs=plan_of(module).ratio)

    untouched = classifier()()
    try:
        trainer(callbacks=[DynCompress("50%")], strategy="ddp_fork", devices=2).fit(untouched, loader(), loader(1))
    except Exception as error:
        tell("refused", message=str(error), converted=plan_of(untouched) is not None)
"""


def run(script: str, folder: Path) -> dict[str, Any]:
    """What the processes of a script told."""
    file = folder / "train.py"
    file.write_text(PROLOGUE + script)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    told = folder / "told"
    told.mkdir()
    done = subprocess.run(
        [sys.executable, str(file), str(told)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: json.loads(path.read_text()) for path in told.iterdir()}


def test_ddp_decides_on_rank_zero_and_shares_the_teacher(tmp_path: Path) -> None:
    told = run(DDP, tmp_path)
    zero, one = told["rank0"], told["rank1"]
    assert zero["before"] != one["before"]
    for fact in ("after", "plan", "told", "teacher"):
        assert zero[fact] == one[fact], fact
    assert zero["teacher"] == zero["told"] == zero["before"]  # rank 0's original teaches both
    assert zero["steps"] == 2  # four batches, two processes
    assert min(zero["term"], one["term"]) > 0


def test_forked_processes_train_what_attach_converted(tmp_path: Path) -> None:
    told = run(SPAWNED, tmp_path)
    assert told["main"]["fingerprint"] == told["worker0"]["fingerprint"] == told["worker1"]["fingerprint"]
    assert told["worker0"]["term"] > 0
    assert 0.49 < told["main"]["macs"] < 0.505
    assert "callback.attach(model, example) before trainer.fit" in told["refused"]["message"]
    assert not told["refused"]["converted"]
