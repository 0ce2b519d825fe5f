"""Published checkpoints: every layout gives the network that was saved, and what is not known is refused."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from iir_dist.errors import InputError
from iir_dist.models.backbones import build_backbone, load_strictly
from iir_dist.models.checkpoints import read_checkpoint

State = dict[str, Tensor]
X = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(0))


def network(name: str) -> tuple[State, Tensor]:
    """Weights of a classifier of torchvision, none of them as it was initialized, and its own last map of X."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = torchvision.models.get_model(name, weights=None).train()
        net(torch.rand(2, 3, 32, 32))  # moves the statistics of batch norm
    maps: list[Tensor] = []
    net.layer4.register_forward_hook(lambda *args: maps.append(args[2]))
    with torch.no_grad():
        net.eval()(X)
    return {k: v.clone() for k, v in net.state_dict().items()}, maps[0]


@pytest.fixture(scope="module")
def resnet18() -> tuple[State, Tensor]:
    return network("resnet18")


def under(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


def trunk(state: State) -> State:
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def other(state: State) -> State:
    """The same names with other values, as momentum networks are."""
    return {k: v + 1 for k, v in state.items()}


def mlp(prefix: str, *, norm: bool = True) -> State:
    layers = {f"{prefix}0.weight": torch.ones(4, 512), f"{prefix}2.bias": torch.ones(4)}
    return layers | (
        {f"{prefix}1.running_mean": torch.ones(4), f"{prefix}1.num_batches_tracked": torch.tensor(1)} if norm else {}
    )


def moco(s: State) -> Any:
    """facebookresearch/moco, builder.py and main_moco.py: v2's fc is an MLP."""
    state = under("module.encoder_q.", trunk(s) | mlp("fc.", norm=False)) | under(
        "module.encoder_k.", other(trunk(s) | mlp("fc.", norm=False))
    )
    state |= {"module.queue": torch.rand(8, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": {"state": {0: {"m": torch.ones(2)}}, "groups": [{"lr": 0.03}]},
    }


def moco3(s: State) -> Any:
    """facebookresearch/moco-v3, builder.py: fc is an MLP, whose last batch norm has no weights."""
    state = under("module.base_encoder.", trunk(s) | mlp("fc.")) | under(
        "module.momentum_encoder.", other(trunk(s) | mlp("fc."))
    )
    return {
        "epoch": 300,
        "arch": "resnet18",
        "state_dict": state | mlp("module.predictor."),
        "optimizer": {},
        "scaler": {"scale": 2.0},
    }


def vissl(s: State) -> Any:
    """facebookresearch/vissl, convert_vissl_to_torchvision.py and checkpoint.py."""
    model = {"trunk": under("_feature_blocks.", trunk(s)), "heads": {"0.clf.0.weight": torch.ones(2, 512)}}
    return {
        "phase_idx": 1,
        "iteration": 5,
        "loss": {},
        "type": "consolidated",
        "classy_state_dict": {"base_model": {"model": model, "meters": {}}},
    }


def swav(s: State) -> Any:
    """facebookresearch/swav, hubconf.py and resnet50.py: the published file is the bare dict."""
    return OrderedDict(under("module.", trunk(s) | mlp("projection_head.") | {"prototypes.weight": torch.ones(3, 4)}))


def swav_many_prototypes(s: State) -> Any:
    """DeepCluster-v2 in the same repository, and main_swav.py's own checkpoint."""
    heads = mlp("projection_head.") | {f"prototypes.prototypes{i}.weight": torch.ones(3, 4) for i in range(2)}
    return {
        "epoch": 800,
        "state_dict": under("module.", trunk(s) | heads),
        "optimizer": {},
        "amp": {"loss_scaler0": {"loss_scale": 1.0}},
    }


def barlow(s: State) -> Any:
    """facebookresearch/barlowtwins, main.py: checkpoint.pth; its bn has no weights."""
    bn = {"bn.running_mean": torch.ones(4), "bn.running_var": torch.ones(4), "bn.num_batches_tracked": torch.tensor(3)}
    return {
        "epoch": 1000,
        "model": under("module.", under("backbone.", trunk(s)) | mlp("projector.") | bn),
        "optimizer": {},
    }


def vicreg(s: State) -> Any:
    """facebookresearch/vicreg, main_vicreg.py: model.pth."""
    return {"epoch": 1000, "model": under("module.", under("backbone.", trunk(s)) | mlp("projector.")), "optimizer": {}}


def dino(s: State) -> Any:
    """facebookresearch/dino, main_dino.py and utils.py: a convnet's teacher is in DistributedDataParallel too."""
    head = mlp("head.mlp.") | {
        "head.last_layer.weight_g": torch.ones(4, 1),
        "head.last_layer.weight_v": torch.ones(4, 4),
    }
    teacher = under("module.", under("backbone.", trunk(s)) | head)
    return {"student": other(teacher), "teacher": teacher, "epoch": 800, "dino_loss": {"center": torch.ones(1, 4)}}


def dino_of_one_process(s: State) -> Any:
    """The teacher without DistributedDataParallel."""
    return {"teacher": under("backbone.", trunk(s)) | mlp("head.mlp.")}


def byol(s: State) -> Any:
    """lightning-bolts, byol_module.py and models.py."""
    arm = under("encoder.", trunk(s)) | mlp("projector.model.")
    state = under("online_network.", arm) | under("target_network.", other(arm)) | mlp("predictor.model.")
    return {"epoch": 10, "global_step": 7, "state_dict": state, "hyper_parameters": {"learning_rate": 0.2}}


def byol_pytorch(s: State) -> Any:
    """lucidrains/byol-pytorch, byol_pytorch.py: the network is registered twice, with its fc."""
    arm = under("net.", s) | mlp("projector.")
    return (
        under("net.", s)
        | under("online_encoder.", arm)
        | under("target_encoder.", other(arm))
        | mlp("online_predictor.")
    )


def byol_converted(s: State) -> Any:
    """ajtejankar/byol-convert, convert.py: torchvision's names and fc without counters of batches."""
    return {k: v for k, v in s.items() if "num_batches_tracked" not in k}


def simclr_lightning(s: State) -> Any:
    """lightning-bolts, simclr_module.py."""
    return {"state_dict": under("encoder.", s) | mlp("projection.model."), "callbacks": {}, "loops": None}


LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "torchvision": (lambda s: s, "plain"),
    "without fc (DINO, Barlow Twins, VICReg)": (trunk, "plain"),
    "in DataParallel": (lambda s: {"state_dict": under("module.", s), "best_acc1": torch.tensor(70.0)}, "plain"),
    "MoCo": (moco, "MoCo"),
    "MoCo v3": (moco3, "MoCo v3"),
    "VISSL": (vissl, "VISSL"),
    "VISSL, its trunk alone": (lambda s: under("_feature_blocks.", trunk(s)), "VISSL"),
    "SwAV": (swav, "SwAV"),
    "DeepCluster v2": (swav_many_prototypes, "SwAV"),
    "Barlow Twins": (barlow, "Barlow Twins"),
    "VICReg": (vicreg, "VICReg"),
    "DINO": (dino, "DINO"),
    "DINO of one process": (dino_of_one_process, "DINO"),
    "BYOL": (byol, "BYOL"),
    "byol-pytorch": (byol_pytorch, "byol-pytorch"),
    "BYOL, converted": (byol_converted, "plain"),
    "SimCLR of Lightning": (simclr_lightning, "Lightning"),
    "backbone of Lightning": (lambda s: {"state_dict": under("backbone.", s)}, "Lightning"),
    "model of Lightning": (lambda s: {"state_dict": under("model.", s)}, "Lightning"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_network_that_was_saved(
    kind: str, resnet18: tuple[State, Tensor], tmp_path: Path
) -> None:
    state, expected = resnet18
    write, layout = LAYOUTS[kind]
    path = str(tmp_path / "w.pth.tar")
    torch.save(write(dict(state)), path)
    loaded, found = read_checkpoint(path)
    assert found == layout
    counters = {k for k in state if "num_batches_tracked" in k} if kind == "BYOL, converted" else set()
    assert loaded.keys() == trunk(state).keys() - counters
    with torch.no_grad():
        assert torch.equal(build_backbone("resnet18", path, seed=1).eval()(X), expected)


def test_resnet50_from_an_old_file_of_torch(tmp_path: Path) -> None:
    state, expected = network("resnet50")
    torch.save(swav(state), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False)  # as torch before 1.6 wrote
    with torch.no_grad():
        assert torch.equal(build_backbone("resnet50", str(tmp_path / "w.pth.tar"), seed=1).eval()(X), expected)


def test_layouts_in_safetensors(resnet18: tuple[State, Tensor], tmp_path: Path) -> None:
    save_file(swav(resnet18[0]), str(tmp_path / "w.safetensors"))
    with torch.no_grad():
        assert torch.equal(build_backbone("resnet18", str(tmp_path / "w.safetensors"), seed=1).eval()(X), resnet18[1])


@pytest.mark.parametrize(
    ("name", "prefix"), [("test_vit", ""), ("test_vit", "module.base_encoder."), ("test_convnext", "")]
)
def test_files_of_timm(name: str, prefix: str, tmp_path: Path) -> None:
    """A classifier is left out; the norm that timm's ConvNeXt keeps under the same prefix is not."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = timm.create_model(name, pretrained=False).eval()
    assert any(k.startswith("head.") for k in net.state_dict())
    torch.save({"state_dict": under(prefix, net.state_dict())}, tmp_path / "w.pth")
    loaded = build_backbone(f"timm:{name}", str(tmp_path / "w.pth"), seed=1).eval()
    x = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.net.forward_features(x), net.forward_features(x))  # type: ignore[operator]
        pooled = loaded.net.forward_head(net.forward_features(x))  # type: ignore[operator]
        assert torch.equal(pooled, net.forward_head(net.forward_features(x), pre_logits=True))


def test_the_log_says_what_was_left_out(
    resnet18: tuple[State, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(moco(resnet18[0]), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="iir_dist"):
        read_checkpoint(str(tmp_path / "w.pth"))
    assert caplog.messages[0].endswith(
        "MoCo layout, 120 tensors; left out as heads: fc. (2), encoder_k. (122), queue (2)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.backbone.bn1.weight"), r"\(VICReg layout\) does not fit .*: 1 missing \(first: bn1.weight\)"),
        (lambda s: s.update({"module.backbone.extra": X}), r"\(VICReg layout\) does not fit .*: 1 unexpected \(first: extra\)"),
        (lambda s: s.update({"module.backbone.bn1.weight": X}), r"does not fit .*: 1 of another shape \(first: bn1.weight\)"),
        (lambda s: s.update({"module.conv1.weight": X}), r"\(VICReg layout\): 1 keys are neither .* \(first: conv1.weight\)"),
        (lambda s: s.update({"module.predictor.0.weight": X}), r"1 keys are neither .* known head \(first: predictor.0.weight\)"),
        (lambda s: s.update({"bn2.weight": X}), r"\(plain layout\) .* 100 missing .* 125 unexpected \(first: bn2.weight"),
    ],
)  # fmt: skip
def test_other_keys_are_refused(
    change: Callable[[State], Any], message: str, resnet18: tuple[State, Tensor], tmp_path: Path
) -> None:
    value = vicreg(resnet18[0])
    change(value["model"])
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        build_backbone("resnet18", str(tmp_path / "w.pth"))


def test_nothing_is_loaded_where_anything_is_refused() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(InputError, match=r"here does not fit the network: 1 missing \(first: bias\)"):
        load_strictly(module, {"weight": torch.zeros(2, 2)}, "here")
    assert torch.equal(module.weight, before)


def test_vits_of_moco_v3_are_refused_where_they_would_mean_something_else(tmp_path: Path) -> None:
    small = under("module.base_encoder.", {"pos_embed": torch.zeros(1, 197, 384), "cls_token": torch.zeros(1, 1, 384)})
    torch.save({"state_dict": small}, tmp_path / "s.pth")
    with pytest.raises(InputError, match=r"ViT-S of MoCo v3 has 12 heads .*timm:vit_base_patch16_224\.dino"):
        read_checkpoint(str(tmp_path / "s.pth"))
    base = under("module.base_encoder.", {"pos_embed": torch.zeros(1, 197, 768), "head.0.weight": torch.zeros(1)})
    torch.save({"state_dict": base}, tmp_path / "b.pth")
    assert list(read_checkpoint(str(tmp_path / "b.pth"))[0]) == ["pos_embed"]
    with pytest.raises(
        InputError, match=r"\(MoCo v3 layout\) does not fit the network: .* 1 unexpected \(first: pos_embed\)"
    ):
        build_backbone("resnet18", str(tmp_path / "b.pth"))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("extra", "culprit"),
    [(argparse.Namespace(lr=0.1), "argparse.Namespace"), (np.float64(0.5), "numpy._core.multiarray.scalar")],
    ids=["Namespace", "NumPy"],
)
def test_objects_beside_the_tensors(extra: Any, culprit: str, new: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"teacher": {"a": X}, "args": extra}, path, _use_new_zipfile_serialization=new)
    message = (
        rf"not readable as plain tensors: it holds {re.escape(culprit)}, and nothing is unpickled\. .*torch\.save\("
    )
    with pytest.raises(InputError, match=message):
        read_checkpoint(str(path))
    # What the message advises is what is read.
    c = torch.load(path, map_location="cpu", weights_only=False)
    torch.save({"teacher": c["teacher"]}, tmp_path / "saved.pth")
    assert torch.equal(read_checkpoint(str(tmp_path / "saved.pth"))[0]["a"], X)


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(new: bool, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"a": X}, "x": Evil(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=new
    )
    with pytest.raises(InputError, match=r"not readable as plain tensors: it holds (posix|nt)\.mkdir"):
        read_checkpoint(str(tmp_path / "w.pth"))
    (tmp_path / "byol.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"byol\.pkl: a bare pickle \(BYOL's own"):
        read_checkpoint(str(tmp_path / "byol.pkl"))
    (tmp_path / "byol.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match="not readable as plain tensors"):
        read_checkpoint(str(tmp_path / "byol.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "holds"),
    [({}, "nothing"), ({"state_dict": {}, "epoch": 3}, "state_dict, epoch"), ([X], "list"), ({"student": {"a": X}}, "student"),
     ({"state_dict": {1: X}}, "state_dict"), ({"a": X, "b": 3}, "a, b")],
)  # fmt: skip
def test_files_without_tensors_say_what_they_hold(value: Any, holds: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=rf"expected a dict of tensors, at the top or in .*teacher.*; it holds: {holds}$"
    ):
        read_checkpoint(str(tmp_path / "w.pth"))


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(InputError, match="no such file"):
            read_checkpoint(str(tmp_path / name))
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(InputError, match=rf"{name}: not readable as plain tensors \(\w+: "):
            read_checkpoint(str(tmp_path / name))
