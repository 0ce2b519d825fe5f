"""InsCLR: who is a positive of whom, the loss, the bank, the rounds; and that photos without labels teach instances."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pretrain_worker import config_of, double, neighbours, trained
from test_pretrain import assert_equal, in_process, on_workers

from iir_dist import artifact, config, embed, ingest, mine
from iir_dist.data import synthetic
from iir_dist.data.cache import Photos
from iir_dist.data.embeddings import open_embeddings
from iir_dist.data.stored import Stored
from iir_dist.errors import ConfigError, InputError
from iir_dist.index import search
from iir_dist.losses.instances import contrastive_sum, positives_in_batch, positives_of_others
from iir_dist.models.encoder import Encoder, EncoderConfig, create, load
from iir_dist.models.encoder import run as make_encoder
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints, launch, pretrain
from iir_dist.train.loop import Run, train
from iir_dist.train.methods import insclr
from iir_dist.train.methods.insclr import InsCLR, InsCLRConfig
from iir_dist.train.methods.method import Context
from iir_dist.train.neighbours import Neighbours, NeighbourSampler
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask
from iir_dist.train.probe import Probe

THRESHOLDS = {"selected": 0.6, "sure": 0.75, "never": 0.5, "mean": 0.6, "margin": 0.1}

# ------------------------------------------------------------------------------------------------ positives and loss


def slow_positives(seen: np.ndarray, batch: np.ndarray) -> tuple[set[tuple[int, int]], set[tuple[int, int]], set[str]]:
    """Pairs of positives in the batch and of the batch with others, by the definition; and which cases there were."""
    in_batch = {(i, j) for i in batch for j in batch if i != j and seen[i, j] >= 0.6}
    of_others, cases = set(), set()
    for i in batch:
        group = [i, *(j for j in batch if (i, j) in in_batch)]
        for other in range(len(seen)):
            if other in batch:
                continue
            if seen[i, other] >= 0.75:
                case = "sure"
            elif seen[i, other] < 0.5:
                case = "never"
            else:
                case = "like the group" if sum(seen[j, other] for j in group) / len(group) >= 0.6 else "unlike it"
            cases.add(case)
            if case in ("sure", "like the group"):
                of_others.add((i, other))
    return in_batch, of_others, cases


@pytest.mark.parametrize("seed", range(3))
def test_pseudo_positives_by_the_definition(seed: int) -> None:
    x = neighbours(60, 12, seed=seed).vectors.astype(np.float64)
    batch = np.random.default_rng(seed).permutation(60)[:20]
    others = np.setdiff1d(np.arange(60), batch)
    in_batch, of_others, cases = slow_positives(x @ x.T, batch)
    assert cases == {"sure", "never", "like the group", "unlike it"}
    own = torch.from_numpy(x[batch])
    positive = positives_in_batch(own @ own.T, 0.6)
    assert {(batch[i], batch[j]) for i, j in positive.nonzero().tolist()} == in_batch
    found = positives_of_others(own @ torch.from_numpy(x[others]).T, positive, 0.75, 0.5, 0.6)
    assert {(batch[i], others[j]) for i, j in found.nonzero().tolist()} == of_others
    assert not positive.diagonal().any()


def test_what_a_pair_costs() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.41, 0.39], [-1.0, 1.0, 0.4, 0.8]], dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    value = contrastive_sum(scores, positive, 0.4)
    assert float(value.detach()) == pytest.approx(0.1 + 0.5 + 0.41 + 2 + 1 + 0.8)
    value.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1, -1, 1, 0], [-1, 1, 0, 1]]


def method_of(table: Neighbours, **changes: Any) -> InsCLR:
    settings = InsCLRConfig.model_validate({**THRESHOLDS, "bank_start": 2, "bank_negatives": 15, **changes})
    return InsCLR(settings, Context(12, 9, 16, 32, 32, None, 3, torch.device("cpu"), table))


def slow_loss(method: InsCLR, step: int, z: np.ndarray, others: list[int]) -> float:
    """The loss by loops over pairs."""
    x, bank = method.neighbours.vectors.astype(np.float64), method.memory.z.double().numpy()
    batch = method.sampler.batch(step)
    in_batch, of_others, _ = slow_positives(x @ x.T, batch)
    total = 0.0
    for i, row in enumerate(batch):
        for j, column in enumerate(batch):
            s = float(z[i] @ z[j])
            if i != j:
                total += 1 - s if (row, column) in in_batch else s if s > 0.1 else 0
        for column in others:
            s = float(z[i] @ bank[column])
            total += 1 - s if (row, column) in of_others else s if s > 0.1 else 0
    return total / len(batch)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("chunk", [2**27, 200])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, step: int, chunk: int) -> None:
    """In float64, against loops and central differences; the bank in one part and in many."""
    monkeypatch.setattr(insclr, "_CHUNK_BYTES", chunk)
    table, rng = neighbours(60, 12), np.random.default_rng(0)
    method = method_of(table)
    batch = method.sampler.batch(step)
    near = set(table.candidates[batch].ravel().tolist()) - set(batch.tolist())
    others = method._others(step, batch).tolist()
    # All candidates, no photo of the batch, and from step 2 on random ones too.
    assert near <= set(others)
    assert not set(others) & set(batch.tolist())
    assert (len(others) > len(near)) == (step == 2)
    z = table.vectors[batch] + 0.3 * rng.normal(size=(16, 12))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    expected = slow_loss(method, step, z, others)
    inputs = torch.from_numpy(z)[None].requires_grad_()
    value = method.loss(step, inputs, None)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, inputs)
    fresh = method_of(table)
    for i, d in rng.integers((16, 12), size=(12, 2)):
        up, down = z.copy(), z.copy()
        up[i, d] += 1e-6
        down[i, d] -= 1e-6
        slope = (slow_loss(fresh, step, up, others) - slow_loss(fresh, step, down, others)) / 2e-6
        assert float(gradient[0, i, d]) == pytest.approx(slope, abs=1e-7)
    # The bank has taken in the batch, and nothing else.
    rows = torch.from_numpy(batch)
    assert torch.equal(method.memory.z[rows], torch.from_numpy(z).float())
    kept = np.setdiff1d(np.arange(60), batch)
    assert torch.equal(method.memory.z[kept], torch.from_numpy(table.vectors)[kept])
    views, seen = method.pair(inputs.detach(), None)
    assert torch.equal(views, inputs[0].detach())
    assert torch.equal(seen, torch.from_numpy(table.vectors[batch]).double())


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"never = 0\.8 and sure = 0\.75.*expected never <= sure"):
        config.load(PretrainConfig, "pretrain", None, ["method.name=insclr", "method.never=0.8"])
    table = neighbours(60, 12)
    alike = table.vectors + 3  # as those of a random network, which lean to one side
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    with pytest.raises(ConfigError, match=r"100% of random pairs of photos have a cosine of 0\.6 \(method\.selected\)"):
        method_of(dataclasses.replace(table, vectors=alike))
    with pytest.raises(InputError, match="a batch of 16"):
        NeighbourSampler(neighbours(12, 12), 64, 3, seed=0).batch(0)


# ------------------------------------------------------------------------------------------------ batches


def test_batches_are_functions_of_seed_step_and_table() -> None:
    table = neighbours(100, 12, k=20)
    sampler = NeighbourSampler(table, 32, 3, seed=5)
    again = NeighbourSampler(neighbours(100, 12, k=20), 32, 3, seed=5)
    anchors = []
    for step in reversed(range(12)):  # 100 anchors, 8 a step
        batch = sampler.batch(step)
        assert np.array_equal(batch, again.batch(step))
        assert len(np.unique(batch)) == len(batch) == 32
        for group in batch.reshape(8, 4):
            ranks = [table.candidates[group[0]].tolist().index(n) for n in group[1:]]
            assert ranks == sorted(ranks)
            # What is nearer but not in the group is elsewhere in the batch.
            assert set(table.candidates[group[0]][: ranks[-1]]) <= set(batch)
        anchors += batch.reshape(8, 4)[:, 0].tolist()
    assert len(set(anchors)) == 96  # each once in an epoch
    later = NeighbourSampler(dataclasses.replace(table, first_step=7), 32, 3, seed=5)
    assert np.array_equal(later.batch(9), sampler.batch(2))
    assert not np.array_equal(NeighbourSampler(table, 32, 3, seed=6).batch(0), sampler.batch(0))
    assert not np.array_equal(sampler.batch(0), sampler.batch(1))


def test_short_lists_are_filled_with_others() -> None:
    table = neighbours(40, 12, k=2)
    table.candidates[::2, 1] = -1
    for size in (40, 39, 10, 3):
        batch = NeighbourSampler(table, size, 3, seed=0).batch(3)
        assert len(np.unique(batch)) == len(batch) == size
        assert batch.min() >= 0


# ------------------------------------------------------------------------------------------------ training


def task_of(images: Path, table: Neighbours | None = None, **changes: Any) -> PretrainTask:
    settings = config_of("insclr", **changes)
    photos, encoder = Photos([artifact.require(images / "unlabelled", "ingest")]), create(settings.encoder)
    return PretrainTask(photos, encoder, settings, neighbours=table or neighbours(len(photos), encoder.spec.dim))


def run_of(task: PretrainTask, steps: int, stop: int) -> Run:
    return Run(steps, task.config.optim, 2, task.config.seed, stop=stop)


@pytest.mark.slow
def test_two_workers_train_the_same_network(images: Path, tmp_path: Path) -> None:
    one = trained(str(images / "unlabelled"), "insclr", tmp_path / "one")
    assert len(set(one["losses"].tolist())) == 3
    assert one["state/z"].shape[0] == 24
    for found in on_workers(2, tmp_path, images, ["insclr"]):
        assert_equal({name: found[f"insclr//{name}"] for name in one}, one, 1e-8)


def test_resumed_is_as_undisturbed_and_a_round_begins_with_its_own_bank(images: Path, tmp_path: Path) -> None:
    whole = task_of(images, steps=6)
    train(whole, run_of(whole, 6, 4), open_folder(tmp_path / "a"))
    for stop in (2, 4):
        part = task_of(images, steps=6)
        train(part, run_of(part, 6, stop), open_folder(tmp_path / "b"))
    states = [checkpoints.read(open_folder(tmp_path / name), checkpoints.name_of(4)) for name in "ab"]
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value), name
    assert torch.equal(states[0]["task"]["z"], states[1]["task"]["z"])
    first = neighbours(24, whole.learner.encoder.spec.dim)
    assert not torch.equal(states[0]["task"]["z"], torch.from_numpy(first.vectors))

    second = dataclasses.replace(neighbours(24, first.vectors.shape[1], seed=1), first_step=4)
    following = task_of(images, second, steps=6)
    train(following, run_of(following, 6, 5), open_folder(tmp_path / "b"))
    bank = following.method.memory.state_dict()["z"]  # type: ignore[union-attr]
    untouched = np.setdiff1d(np.arange(24), following._batch(4))
    assert len(untouched) == 16
    assert torch.equal(bank[untouched], torch.from_numpy(second.vectors)[untouched])
    # Statistics of batch norm are frozen, the rest of the trunk has been trained.
    begun, ended = create(whole.config.encoder).state_dict(), states[0]["model"]
    for name, value in begun.items():
        if name.startswith("trunk."):
            assert torch.equal(ended[f"encoder.{name}"], value) == ("running" in name or "tracked" in name), name


def test_views_are_the_descriptors_of_the_encoder(images: Path) -> None:
    task = double(task_of(images))
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(task.learner(x), task.learner.encoder.describe(x))
    assert not any(m.training for m in task.learner.encoder.modules())
    seeds = [{key.number: key.seed for chunk in task._keys(step) for key in chunk} for step in range(3)]
    both = set(seeds[0]) & (set(seeds[1]) | set(seeds[2]))
    assert both  # photos come again as neighbours, in other views
    assert all(len({s[n] for s in seeds if n in s}) > 1 for n in both)


# ------------------------------------------------------------------------------------------------ the table


def expected_table(embedded: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors by number, of artifacts that were embedded one by one, and their cosines in float64."""
    parts = []
    for folder in embedded:
        blocks = list(open_embeddings(folder).blocks())
        ids, x = np.concatenate([b.ids for b in blocks]), np.concatenate([b.vectors for b in blocks])  # type: ignore[misc]
        splits = np.concatenate([b.splits for b in blocks])  # type: ignore[misc]
        order = np.argsort(ids)
        parts.append(x[order][splits[order] != "query"])
    vectors = np.concatenate(parts)
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    return vectors, scores


def check_table(uri: str, vectors: np.ndarray, scores: np.ndarray, k: int, names: list[str]) -> Neighbours:
    table = Neighbours.read(uri, 7)
    assert table.first_step == 7
    assert table.candidates.shape == (len(vectors), k)
    assert np.allclose(table.vectors, vectors, atol=1e-5)
    lines = pq.read_table(uri).to_pylist()
    assert [line["name"] for line in lines] == names
    for n, line in enumerate(lines):
        assert line["candidates"] == table.candidates[n].tolist()
        assert n not in line["candidates"]
        best = np.sort(scores[n])[::-1][:k]
        assert line["scores"] == pytest.approx(best.tolist(), abs=1e-5)
        assert scores[n][table.candidates[n]] == pytest.approx(best, abs=1e-5)
    return table


@pytest.mark.ray
def test_the_table_is_that_of_an_exact_search(
    images: Path, encoder: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One artifact is embedded where it lies; what was cut off goes on; what is finished is not done again."""
    source, work = str(images / "distractors"), tmp_path / "round"
    settings = {"candidates": 7, "exact_rows": 1000, "seed": 0}

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "run", die)
        with pytest.raises(KeyboardInterrupt):
            mine.neighbours([source], str(encoder), str(work), **settings)  # type: ignore[arg-type]
    assert (work / "embeddings" / "manifest.json").exists()
    uri = mine.neighbours([source], str(encoder), str(work), **settings)  # type: ignore[arg-type]
    assert [path.name for path in work.iterdir() if any(p.is_file() for p in path.rglob("*"))] == ["neighbours"]
    names = Stored.read([artifact.require(source, "ingest")]).names
    check_table(uri, *expected_table([embeddings / "distractors"]), 7, names)
    monkeypatch.setattr(embed, "run", die)
    assert mine.neighbours([source], str(encoder), str(work), **settings) == uri  # type: ignore[arg-type]


@pytest.mark.ray
@pytest.mark.slow
def test_the_table_of_several_artifacts_and_by_an_index(
    images: Path, encoder: Path, embeddings: Path, tmp_path: Path
) -> None:
    """Numbers run on from one artifact to the next; of a small set, all others are neighbours."""
    sources = [str(images / name) for name in ("distractors", "benchmark", "train")]
    embed.run(sources[2], str(encoder), str(tmp_path / "train"), embed.EmbedConfig())
    names = Stored.read([artifact.require(source, "ingest") for source in sources]).names
    vectors, scores = expected_table([embeddings / "distractors", embeddings / "benchmark", tmp_path / "train"])
    settings: dict[str, Any] = {"candidates": 500, "seed": 0}
    exact = mine.neighbours(sources, str(encoder), str(tmp_path / "exact"), exact_rows=1000, **settings)
    check_table(exact, vectors, scores, len(names) - 1, names)
    by_index = mine.neighbours(
        sources, str(encoder), str(tmp_path / "index"), exact_rows=0, **settings | {"candidates": 10}
    )
    found = Neighbours.read(by_index, 0).candidates
    same = [
        len(set(a) & set(b)) / 10
        for a, b in zip(found.tolist(), Neighbours.read(exact, 0).candidates[:, :10].tolist(), strict=True)
    ]
    assert np.mean(same) > 0.9  # its vectors are float16: near ties may change places


# ------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with 240 training photos of 24 landmarks, whose labels the training does not see, and a benchmark."""
    root = tmp_path_factory.mktemp("landmarks")
    world = synthetic.World(landmarks=8, queries=3, views=12, train_landmarks=24, train_views=10, unlabelled=1,
                            distractors=1, side=128)  # fmt: skip
    synthetic.write(world, root)
    for name in ("benchmark", "train"):
        truth = str(root / "groundtruth.json") if name == "benchmark" else None
        settings = ingest.IngestConfig.model_validate({"split": "db" if truth else "train"})
        ingest.run([str(root / f"{name}.tar")], str(root / "images" / name), settings, groundtruth_uri=truth)
    return root / "images"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's lite0. It tells photos apart, but drawn facades badly: of these, two have a mean cosine of 0.57."""
    out = tmp_path_factory.mktemp("start") / "encoder"
    make_encoder(str(out), EncoderConfig(size=96))
    return out


ABOVE = {"selected": 0.7, "sure": 0.75, "never": 0.65, "mean": 0.7, "margin": 0.6}
"""Thresholds above what drawn facades have in common."""


@pytest.mark.ray
@pytest.mark.slow
def test_instances_are_learnt_without_labels(
    landmarks: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudo positives are right more often than chance, and ever more so; photos of other landmarks are found better.

    The last is due to what is pushed apart: with so few right positives, a run without any gains as much.
    """
    in_process(monkeypatch)
    tables: list[Neighbours] = []
    read = Neighbours.read

    def noted(uri: str, first_step: int) -> Neighbours:
        tables.append(read(uri, first_step))
        return tables[-1]

    monkeypatch.setattr(Neighbours, "read", noted)
    settings = PretrainConfig.model_validate(
        {
            "method": {"name": "insclr", "candidates": 40, "bank_start": 5, "bank_negatives": 50, **ABOVE},
            "crop": 64, "min_scale": 0.5, "batch": 32, "chunk": 16, "steps": 24, "checkpoint_every": 24,
            "optim": {"lr": 2e-5, "warmup_steps": 4}, "probe": {"every": 12, "keep": "last"},
        }
    )  # fmt: skip
    pretrain.run(
        [str(landmarks / "train")], str(tmp_path / "e"), settings, init=str(start), probe=str(landmarks / "benchmark"),
        find=mine.neighbours,
    )  # fmt: skip
    assert [table.first_step for table in tables] == [0, 8, 16]
    labels = np.array(Stored.read([artifact.require(landmarks / "train", "ingest")]).labels)
    same = labels[:, None] == labels
    np.fill_diagonal(same, False)
    precisions = []
    for table in tables:
        chosen = table.vectors @ table.vectors.T >= 0.7
        np.fill_diagonal(chosen, False)
        precisions.append(float((same & chosen).sum() / chosen.sum()))
    assert min(precisions) > 1.5 * same.mean()
    assert precisions[2] > precisions[0]
    maps = []
    for uri in (start, tmp_path / "e"):
        network = load(*artifact.require(uri, "encoder", "pretrain"))
        probe = Probe(artifact.require(landmarks / "benchmark", "ingest"), network)
        found, health = probe.measure(network, torch.device("cpu"))
        maps.append(found["map"])
        assert health.warning() is None
    assert maps[1] > maps[0] + 0.01, maps
    assert network.spec.weights == "insclr:imagenet"


@pytest.mark.ray
@pytest.mark.slow
def test_rounds_go_on_where_they_were_cut_off(
    images: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while neighbours are searched, within a round and between two: the weights of an undisturbed run."""
    in_process(monkeypatch)
    settings = PretrainConfig.model_validate(
        {
            "method": {"name": "insclr", "rounds": 2, "bank_start": 1, "bank_negatives": 5, **ABOVE},
            "crop": 32, "batch": 8, "chunk": 4, "steps": 6, "checkpoint_every": 1,
        }
    )  # fmt: skip

    def pretrained(out: Path) -> Encoder:
        pretrain.run([str(images / "unlabelled")], str(out), settings, init=str(start), find=mine.neighbours)
        return load(*artifact.require(out, "pretrain"))

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    whole, step = pretrained(tmp_path / "whole"), PretrainTask.step
    for moment in ("search", 2, 3, "launch", 5):
        with monkeypatch.context() as patch:
            if moment == "search":
                patch.setattr(search, "run", die)
            elif moment == "launch":  # when the second round's neighbours are there
                patch.setattr(launch, "launch", die)
            else:
                patch.setattr(PretrainTask, "step", lambda t, n, s, at=moment: die() if n == at else step(t, n, s))
            with pytest.raises(KeyboardInterrupt):
                pretrained(tmp_path / "cut")
    resumed = pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.state_dict().items())
    assert not (tmp_path / "cut" / "_work").exists()
