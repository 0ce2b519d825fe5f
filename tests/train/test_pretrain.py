"""Every self-supervised method: equal on any number of workers, and what its networks, its probe and its config do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretrain_worker
import pytest
import torch
from pretrain_worker import SMALL, STEPS, config_of, trained
from torch import Tensor, nn

from iir_dist import artifact, config, embed, evaluate, ingest, whiten
from iir_dist.data import synthetic
from iir_dist.data.cache import Photos
from iir_dist.errors import ConfigError, InputError, TrainingError
from iir_dist.index import search
from iir_dist.models.encoder import create, load
from iir_dist.storage import open_folder
from iir_dist.train import launch, pretrain
from iir_dist.train.collapse import Health
from iir_dist.train.loop import Run, train
from iir_dist.train.norm import GlobalBatchNorm, Running, globalize
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask
from iir_dist.train.probe import Probe, knn_accuracy

VARIED = ["moco_v2/recompute", "simclr/recompute", "byol/global", "simclr/global"]


def on_workers(world: int, folder: Path, images: Path, cases: list[str]) -> list[dict[str, Tensor]]:
    """What each of `world` processes ends with."""
    processes = [
        subprocess.Popen(
            [sys.executable, pretrain_worker.__file__, str(rank), str(world), str(folder / f"meet-{world}"),
             str(folder / f"out-{world}"), str(images / "unlabelled"), *cases]
        )
        for rank in range(world)
    ]  # fmt: skip
    assert [p.wait(timeout=500) for p in processes] == [0] * world
    return [torch.load(folder / f"out-{world}.{rank}", weights_only=True) for rank in range(world)]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Counters of batches apart, of which nothing is computed."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.isfinite(value).all(), name
            assert torch.allclose(found[name].double(), value.double(), atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize(
    ("workers", "cases"),
    [
        (2, ["moco_v2", "swav", "dino", "byol/global"]),
        pytest.param(2, [*SMALL, *VARIED], marks=pytest.mark.slow),
        pytest.param(4, [*SMALL, *VARIED], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_trains_the_same_network(
    workers: int, cases: list[str], images: Path, tmp_path: Path
) -> None:
    """Loss, weights, running statistics, momentum network, queues, prototypes and centre after three steps, in float64."""
    (one,) = on_workers(1, tmp_path, images, cases)
    for found in on_workers(workers, tmp_path, images, cases):
        assert_equal(found, one, 1e-8)  # queues are float32: a double between two floats may be rounded either way
    for case in cases:
        assert len(set(one[f"{case}//losses"].tolist())) == STEPS, case


@pytest.mark.parametrize(
    "name", ["simclr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moco_v2", "dino"))]
)
def test_a_second_forward_pass_gives_the_direct_gradient(name: str, images: Path, tmp_path: Path) -> None:
    """With two chunks and with four: the same as with all activations kept, running statistics too."""
    for direct, again in (("direct", "once"), ("", "recompute")):
        one = trained(str(images / "unlabelled"), f"{name}/{direct}".rstrip("/"), tmp_path / f"a{direct}")
        two = trained(str(images / "unlabelled"), f"{name}/{again}", tmp_path / f"b{direct}")
        assert_equal(two, one, 1e-10)


def test_global_batch_norm_is_batch_norm() -> None:
    """On one worker, in float64: output, both gradients, running statistics; and in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.Linear(80, 4), nn.BatchNorm1d(4)
    )
    net = net.double()
    ours = globalize(copy.deepcopy(net))
    assert isinstance(ours[1], GlobalBatchNorm)  # type: ignore[index]
    x = torch.randn(7, 3, 6, 6, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(7, 4, dtype=torch.float64)
    for model, value in ((net, a), (ours, b)):
        (model(value) * weight).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=1e-12)
    for (name, p), q in zip(net.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-10), name  # type: ignore[arg-type]
    for name, value in net.state_dict().items():
        if "tracked" not in name:
            assert torch.allclose(value, ours.state_dict()[name], atol=1e-12), name
    assert torch.allclose(net.eval()(x), ours.eval()(x), atol=1e-12)


def test_running_statistics_move_to_the_mean_over_the_passes() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.25)
    running = Running(norm)
    passes = [torch.randn(6, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    running.begin()
    for x in passes:
        norm(x)
        running.count()
    norm(torch.full((6, 2), 100.0))  # a repeated pass, say: it does not count
    running.end()
    mean = torch.stack([x.mean(0) for x in passes]).mean(0)
    var = torch.stack([x.var(0) for x in passes]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, 0.25 * mean, atol=1e-6)
    assert torch.allclose(norm.running_var, 0.75 + 0.25 * var, atol=1e-6)


def task_of(images: Path, case: str, **changes: Any) -> PretrainTask:
    settings = config_of(case, **changes)
    return PretrainTask(Photos([artifact.require(images / "unlabelled", "ingest")]), create(settings.encoder), settings)


def test_the_momentum_network_follows_and_is_not_trained(images: Path) -> None:
    task = task_of(images, "moco_v2")
    learner = task.learner
    assert learner.target is not None
    assert not any(p.requires_grad for p in learner.target.parameters())
    first = learner.target.head[0].weight.clone()  # type: ignore[index]
    task.step(0, 1.0)
    with torch.no_grad():
        learner.head[0].weight += 1.0  # type: ignore[index]
    task.step(1, 1.0)
    assert torch.allclose(learner.target.head[0].weight, first + 0.1, atol=1e-6)  # type: ignore[index]
    assert all(p.grad is None for p in learner.target.parameters())


def test_the_probe_measures_the_network_that_is_the_result(images: Path) -> None:
    """DINO's teacher, SimCLR's only one."""
    measured: list[nn.Module] = []

    class Watch:
        def measure(self, encoder: nn.Module, device: torch.device) -> Any:
            measured.append(encoder)
            return {"map": 0.5}, Health.of(torch.eye(4))

    for name in ("dino", "simclr"):
        task = task_of(images, name)
        task.step(0, 1.0)
        task.probe = Watch()  # type: ignore[assignment]
        task.validate()
        learner = task.learner
        expected = learner.target.encoder if learner.target is not None else learner.encoder
        assert measured.pop() is expected


@pytest.mark.parametrize("name", ["dino", "moco_v3"])
def test_a_vit_is_trained_by_its_class_token(images: Path, name: str) -> None:
    """Two sizes of views, positions that are interpolated, no batch norm in the trunk."""
    vit = {"backbone": "timm:test_vit", "weights": "random", "size": 48, "pooling": "cls"}
    task = task_of(images, name, encoder=vit, crop=48, local_crop=32)
    losses = [task.step(step, 1.0).loss for step in range(2)]
    assert all(loss > 0 for loss in losses)
    gradients = dict(task.learner.encoder.trunk.net.named_parameters())
    assert gradients["cls_token"].grad is not None
    assert gradients["cls_token"].grad.abs().max() > 0


def test_keys_are_dealt_to_other_chunks_and_views_are_functions_of_the_epoch(images: Path) -> None:
    task = task_of(images, "moco_v2", steps=9)
    chunks = task._keys(4)
    queries = [[key.number for key in chunk] for chunk in chunks[0::2]]
    keys = [[key.number for key in chunk] for chunk in chunks[1::2]]
    assert sorted(n for chunk in queries for n in chunk) == sorted(n for chunk in keys for n in chunk)
    assert [sorted(x) for x in queries] != [sorted(x) for x in keys]
    assert {key.view for chunk in chunks[0::2] for key in chunk} == {0}
    assert {key.view for chunk in chunks[1::2] for key in chunk} == {1}
    # 24 photos in batches of 8 make epochs of 3 steps.
    seeds: dict[int, set[int]] = {}
    for step in range(9):
        for chunk in task._keys(step)[0::2]:
            for key in chunk:
                seeds.setdefault(key.number, set()).add(key.seed)
    assert {len(found) for found in seeds.values()} == {3}


def test_what_is_not_finite_names_the_photos(images: Path, tmp_path: Path) -> None:
    task = task_of(images, "simclr")
    forward = task._embed_online

    def poisoned(x: Tensor) -> Tensor:
        z = forward(x)
        z.data[0, 0] = torch.nan
        return z

    task._embed_online = poisoned  # type: ignore[method-assign]
    name = task.names(0, [0])[0]
    with pytest.raises(TrainingError, match=f"loss is nan at step 0; the embeddings of {name}"):
        train(task, Run(3, task.config.optim, 3, 0), open_folder(tmp_path))


def test_optimization_is_the_published_one_scaled_to_the_batch() -> None:
    found = PretrainConfig.model_validate({"method": {"name": "barlow_twins"}, "batch": 2048}).optim
    assert (found.optimizer, found.lr, found.vectors, found.schedule) == ("lars", pytest.approx(1.6), 0.024, "cosine")
    found = PretrainConfig.model_validate(
        {"method": {"name": "simsiam"}, "batch": 512, "optim": {"weight_decay": 0.0}}
    ).optim
    assert (found.optimizer, found.lr, found.weight_decay) == ("sgd", pytest.approx(0.1), 0.0)
    assert found.unscheduled == ("predictor.*",)
    given = PretrainConfig.model_validate({"optim": {"optimizer": "adamw", "lr": 1e-3}, "batch": 512})
    assert (given.optim.optimizer, given.optim.lr, given.method.name) == ("adamw", 1e-3, "simclr")
    assert PretrainConfig.model_validate(given.model_dump(mode="json")) == given
    moco = {"method": {"name": "moco_v2"}}
    assert PretrainConfig.model_validate(moco).chunk == 32
    assert PretrainConfig.model_validate({**moco, "batch": 20}).chunk == 10
    assert PretrainConfig.model_validate({**moco, "norm": "global"}).chunk is None
    assert given.chunk is None


def test_configs_that_are_refused(images: Path) -> None:
    def load_(*settings: str) -> PretrainConfig:
        return config.load(PretrainConfig, "pretrain", None, settings)

    with pytest.raises(
        ConfigError, match=r'norm = "global" takes its statistics over the whole batch; expected chunk = null'
    ):
        load_("norm=global", "chunk=32")
    with pytest.raises(ConfigError, match="recompute = true keeps the activations of one chunk; expected chunk"):
        load_("recompute=true")
    with pytest.raises(
        ConfigError, match=r"pretrain\.method\.queue is not a known key; known: dim, name, strength, temperature"
    ):
        load_("method.queue=3")
    with pytest.raises(
        ConfigError, match=r"optim\.optimizer = 'adam' without optim\.lr: .* simclr is for lars; set optim\.lr"
    ):
        load_("optim.optimizer=adam")
    with pytest.raises(ConfigError, match="moco_v2"):
        load_("method.name=moco")
    with pytest.raises(
        ConfigError, match=r"keys among other photos than their queries, and the 8 photos of a batch are one"
    ):
        task_of(images, "moco_v2", chunk=8)
    with pytest.raises(ConfigError, match=r"workers = \(3, 2\): expected a number from 1"):
        load_("workers=[3,2]")


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage's body here, as the only worker: the loop knows no Ray."""

    def run(body: launch.Body, arguments: dict[str, Any], **_: Any) -> None:
        body(arguments, lambda step, note: None)

    monkeypatch.setattr(launch, "launch", run)


def test_the_probe_gives_the_map_of_the_stages(images: Path, encoder: Path, tmp_path: Path) -> None:
    found = Probe(artifact.require(images / "benchmark", "ingest"), load(*artifact.require(encoder, "encoder")))
    network = load(*artifact.require(encoder, "encoder")).train()
    figures, health = found.measure(network, torch.device("cpu"))
    assert network.training
    embed.run(str(images / "benchmark"), str(encoder), str(tmp_path / "v"), embed.EmbedConfig())
    vectors = str(tmp_path / "v")
    search.run([vectors], [vectors], str(tmp_path / "r"), search.SearchConfig())
    evaluate.run(str(tmp_path / "r"), str(images / "benchmark"), str(tmp_path / "m"), evaluate.EvaluateConfig())
    levels = json.loads((tmp_path / "m" / "metrics.json").read_text())["metrics"]
    expected = next(iter(levels.values()))["map"]
    assert figures["map"] == pytest.approx(expected, abs=2e-3)  # stored vectors are rounded to float16
    assert health.alignment is None


def test_the_probe_by_labels(images: Path, encoder: Path) -> None:
    network = load(*artifact.require(encoder, "encoder"))
    figures, health = Probe(artifact.require(images / "train", "ingest"), network, 3).measure(
        network, torch.device("cpu")
    )
    assert 0 < figures["map"] <= 1
    assert 0 < figures["knn"] <= 1
    assert health.alignment is not None
    with pytest.raises(InputError, match="has neither ground truth nor labels of two classes"):
        Probe(artifact.require(images / "unlabelled", "ingest"), network)


def test_neighbours_vote_by_hand() -> None:
    """On a circle, degrees 0, 10, 20 of one class; 15, 90, 100 of the other.

    The nearest alone is right for 0, 90 and 100. Of three, 10 and 20 have two of their own class, at 10 and 10 or 20 degrees,
    which outweigh the one at 5; 15 has none of its own.
    """
    degrees = torch.tensor([0.0, 10, 20, 90, 100, 15])
    z = torch.stack([torch.cos(degrees.deg2rad()), torch.sin(degrees.deg2rad())], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert knn_accuracy(z, labels, 1) == pytest.approx(3 / 6)
    assert knn_accuracy(z, labels, 3) == pytest.approx(5 / 6)
    unlabelled = torch.cat([labels, torch.tensor([-1])])
    assert knn_accuracy(torch.cat([z, z[:1]]), unlabelled, 3) == pytest.approx(5 / 6)


def test_pretraining_with_a_probe_from_an_encoder(
    images: Path, encoder: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    settings = config_of("byol", probe={"every": 2, "keep": "best"}, steps=4)
    out = tmp_path / "e"
    pretrain.run([str(images / "unlabelled")], str(out), settings, init=str(encoder), probe=str(images / "benchmark"))
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [("val_map" in line) for line in lines] == [False, True, False, True]
    for key in ("val_spread", "val_effective_rank", "val_uniformity", "val_head_spread", "val_warning"):
        assert key in lines[1], key
    best = torch.load(out / "checkpoints/best.pt", weights_only=True)
    assert best["map"] == max(line["val_map"] for line in lines if "val_map" in line)
    found = load(*artifact.require(out, "pretrain"))
    assert found.spec.backbone == "resnet18"  # of the encoder that it began with, not of the config
    assert found.spec.weights == "byol:random"
    whiten.run(str(embeddings / "distractors"), str(encoder), str(tmp_path / "w"), whiten.WhitenConfig(dim=4))
    with pytest.raises(ConfigError, match="has a projection or a whitening"):
        pretrain.run([str(images / "unlabelled")], str(tmp_path / "x"), settings, init=str(tmp_path / "w"))


def test_a_collapse_is_told(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A head that gives the same for all photos, which the loss of BYOL likes best."""
    in_process(monkeypatch)
    step = PretrainTask.step

    def collapsed(self: PretrainTask, number: int, scale: float) -> Any:
        outcome = step(self, number, scale)
        self._last = self._last[:1].repeat(8, 1)
        return outcome

    monkeypatch.setattr(PretrainTask, "step", collapsed)
    settings = config_of("byol", probe={"every": 3})
    with caplog.at_level("WARNING"):
        pretrain.run([str(images / "unlabelled")], str(tmp_path / "e"), settings, probe=str(images / "benchmark"))
    assert "pretrain: at step 3 the network has collapsed completely" in caplog.text
    assert "byol: lower optim.lr" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("compile_", [False, True])
def test_bfloat16_and_compilation_train(images: Path, tmp_path: Path, compile_: bool) -> None:
    task = task_of(images, "simclr", precision="bfloat16", compile=compile_)
    outcome = task.step(0, 1.0)
    exact = task_of(images, "simclr").step(0, 1.0)
    assert outcome.loss == pytest.approx(exact.loss, rel=0.05)


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger world: 400 photos without labels, and a benchmark of 8 landmarks."""
    root = tmp_path_factory.mktemp("landmarks")
    world = synthetic.World(landmarks=8, queries=3, views=12, unlabelled=400, train_landmarks=2, train_views=2,
                            distractors=2, side=128)  # fmt: skip
    synthetic.write(world, root)
    for name, split in (("benchmark", "db"), ("unlabelled", "train")):
        truth = str(root / "groundtruth.json") if name == "benchmark" else None
        settings = ingest.IngestConfig.model_validate({"split": split})
        ingest.run([str(root / f"{name}.tar")], str(root / "images" / name), settings, groundtruth_uri=truth)
    return root / "images"


TRAINABLE: dict[str, dict[str, Any]] = {
    "simclr": {"dim": 64},
    "moco_v2": {"dim": 64, "queue": 256, "momentum": 0.98},
    "moco_v3": {"dim": 64, "hidden": 128, "momentum": 0.98, "temperature": 0.2},
    "byol": {"dim": 64, "hidden": 128, "momentum": 0.98},
    "simsiam": {"dim": 128, "bottleneck": 32},
    "swav": {"dim": 64, "prototypes": 32, "local_views": 0, "freeze_prototypes": 12, "epsilon": 0.02},
    "barlow_twins": {"dim": 128},
    "vicreg": {"dim": 128},
    "dino": {"hidden": 128, "bottleneck": 64, "prototypes": 64, "local_views": 2, "freeze_last": 12, "momentum": 0.98},
}  # fmt: skip

SLOWER = {"lr": 1e-3, "ema": 0.95}
"""For methods that compare no photo with another: their networks swing about for longer than 200 steps of the others' rate."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINABLE)
def test_200_steps_raise_the_map(name: str, landmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    settings = PretrainConfig.model_validate(
        {
            "encoder": {"backbone": "timm:test_resnet", "weights": "random", "size": 96},
            "method": {"name": name, **TRAINABLE[name]}, "crop": 64, "local_crop": 48, "min_scale": 0.3, "batch": 32,
            "steps": 200, "optim": {
                "optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "warmup_steps": 12,
                **(SLOWER if name in ("byol", "simsiam") else {}),
            },
            "checkpoint_every": 200, "probe": {"every": 50, "keep": "last"},
        }
    )  # fmt: skip
    network = create(settings.encoder)
    before, _ = Probe(artifact.require(landmarks / "benchmark", "ingest"), network).measure(
        network, torch.device("cpu")
    )
    pretrain.run([str(landmarks / "unlabelled")], str(tmp_path / "e"), settings, probe=str(landmarks / "benchmark"))
    encoder = load(*artifact.require(tmp_path / "e", "pretrain"))
    after, health = Probe(artifact.require(landmarks / "benchmark", "ingest"), encoder).measure(
        encoder, torch.device("cpu")
    )
    assert after["map"] > before["map"] + 0.02, (before, after)
    assert health.warning() is None
