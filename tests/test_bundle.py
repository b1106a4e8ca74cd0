from __future__ import annotations

import pytest
import torch
from torch import nn

import networks
from dyncompress import bundle
from dyncompress.conversion import convert, plan_of
from dyncompress.errors import CheckpointError, PlanError
from dyncompress.plan import Plan
from dyncompress.planning import make_plan


@pytest.fixture
def student():
    net, x = networks.make(networks.ZeroPad)
    student = convert(net, make_plan(net, x, "50%"))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "router" in name:
                p.add_(0.1 * torch.randn_like(p))  # really dynamic
    return student, x


def test_a_bundle_loads_into_an_untrained_original(student, tmp_path):
    net, x = student
    path = bundle.save(net, tmp_path / "student.safetensors")
    again = bundle.load(path, networks.ZeroPad()).eval()
    assert torch.equal(again(x), net(x))
    assert plan_of(again) == plan_of(net)
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_loading_writes_the_plan_out_no_oftener_for_a_deeper_network(student, tmp_path, monkeypatch):
    """Asking for the state dict once per tensor took twenty seconds on a DenseNet of fifty layers."""
    path = bundle.save(student[0], tmp_path / "student.safetensors")
    written = []
    to_json = Plan.to_json
    monkeypatch.setattr(Plan, "to_json", lambda self: written.append(1) or to_json(self))
    bundle.load(path, networks.ZeroPad())
    assert len(written) <= 4 < len(student[0].state_dict())


def test_torch_checkpoints_load_too_at_any_depth(student, tmp_path):
    net, x = student
    torch.save({"state_dict": nn.ModuleDict({"net": net}).state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    assert torch.equal(bundle.load(tmp_path / "last.ckpt", networks.ZeroPad()).eval()(x), net(x))


def test_a_bundle_holds_no_pickle(student, tmp_path):
    content = bundle.save(student[0], tmp_path / "s.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") < len(content) and content[8:9] == b"{"


def test_what_cannot_be_loaded_says_why(student, tmp_path):
    net, _ = student
    with pytest.raises(CheckpointError, match="no file"):
        bundle.load(tmp_path / "nowhere.safetensors", networks.ZeroPad())
    with pytest.raises(CheckpointError, match="carries no plan"):
        bundle.save(networks.ZeroPad(), tmp_path / "plain.safetensors")
    torch.save(networks.ZeroPad().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="holds no plan"):
        bundle.load(tmp_path / "plain.pt", networks.ZeroPad())
    path = bundle.save(net, tmp_path / "s.safetensors")
    with pytest.raises(PlanError, match="another network"):
        bundle.load(path, networks.Residual())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="can't be read"):
        bundle.load(path, networks.ZeroPad())
    (tmp_path / "junk.ckpt").write_bytes(b"junk" * 50)
    with pytest.raises(CheckpointError, match="can't be read"):
        bundle.load(tmp_path / "junk.ckpt", networks.ZeroPad())
    torch.save(networks.ZeroPad(), tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match="weights only"):
        bundle.load(tmp_path / "pickled.pt", networks.ZeroPad())
