"""Hard negatives: who is drawn, what is chosen, and a round of mining by the stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from photos import image_rows

from iir_dist import artifact, embed, ingest, mine
from iir_dist.data.cache import Photos
from iir_dist.data.embeddings import open_embeddings
from iir_dist.data.sampling import TupleSampler
from iir_dist.data.stored import Stored
from iir_dist.errors import InputError, MismatchError
from iir_dist.index import search
from iir_dist.train.mining import MiningConfig, depth, draw, nearest_of_other_classes, random_positives

NAMES = [f"photo_{number}" for number in range(200)]
LABELS = [None if n % 9 == 0 else "alone" if n == 7 else f"class_{n % 12}" for n in range(200)]


def config(**values: Any) -> MiningConfig:
    return MiningConfig.model_validate({"queries": 20, "pool": 60, "negatives": 3, **values})


# ------------------------------------------------------------------------------------------------ pure


def test_who_is_drawn() -> None:
    drawn = draw(NAMES, LABELS, 0, config())
    assert len(drawn.queries) == 20
    assert len(drawn.searched) == 80
    assert set(drawn.queries) <= set(drawn.searched)
    assert all(LABELS[n] is not None for n in drawn.searched)
    assert all(LABELS.count(LABELS[n]) > 1 for n in drawn.queries)
    assert [drawn.classes[n] == drawn.classes[m] for n in (1, 2) for m in (13, 14)] == [True, False, False, True]
    assert {n for n in range(200) if drawn.classes[n] < 0} == {n for n in range(200) if LABELS[n] is None}
    # Other rounds and seeds draw others, the same ones the same, whatever the order of the images.
    again = draw(NAMES, LABELS, 0, config())
    assert np.array_equal(again.searched, drawn.searched)
    back = draw(NAMES[::-1], LABELS[::-1], 0, config())
    assert {NAMES[::-1][n] for n in back.queries} == {NAMES[n] for n in drawn.queries}
    for other in (draw(NAMES, LABELS, 1, config()), draw(NAMES, LABELS, 0, config(seed=1))):
        assert 0 < len(set(other.searched) - set(drawn.searched)) < 80
        assert set(other.queries) != set(drawn.queries)
    # Of a smaller set, all; every image is a query once in so many rounds, about as often as any other.
    everything = draw(NAMES, LABELS, 0, config(queries=10_000))
    assert len(everything.searched) == sum(label is not None for label in LABELS)
    counts = Counter(n for r in range(200) for n in draw(NAMES, LABELS, r, config()).queries.tolist())
    assert len(counts) == len(everything.queries) == len(everything.searched) - 1  # but for the one that is alone
    assert max(counts.values()) < 4 * min(counts.values())


def test_what_cannot_be_mined() -> None:
    with pytest.raises(
        InputError, match=r"mining.negatives = 13.*the 80 images of a round have 12 classes; ask for at"
    ):
        draw(NAMES, [label and label.replace("alone", "class_7") for label in LABELS], 0, config(negatives=13))
    with pytest.raises(InputError, match="0 classes have two or more images"):
        draw(NAMES, [None] * 200, 0, config())


def test_positives_are_others_of_the_class() -> None:
    drawn = draw(NAMES, LABELS, 0, config(queries=200))
    seen = set()
    for round_number in range(30):
        positives = random_positives(drawn, round_number, 0)
        assert np.array_equal(positives, random_positives(drawn, round_number, 0))
        assert (positives != drawn.queries).all()
        assert (drawn.classes[positives] == drawn.classes[drawn.queries]).all()
        seen |= set(positives.tolist())
    assert seen == set(drawn.queries.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_one_negative_of_a_class_by_the_definition(seed: int) -> None:
    """Against the definition, written as a loop; and lists of `depth` hold enough, also where the worst comes first."""
    rng = np.random.default_rng(seed)
    labels = [f"c{c}" for c in rng.geometric(0.2, 300)]
    drawn = draw([str(n) for n in range(300)], labels, seed, config(queries=15, pool=100))
    by_size = np.argsort(-np.bincount(drawn.classes)[drawn.classes[drawn.searched]], kind="stable")
    for query in drawn.queries:
        own = drawn.classes[query]
        worst = drawn.searched[by_size]
        worst = np.concatenate([worst[drawn.classes[worst] == own], worst[drawn.classes[worst] != own]])
        for ranked in (worst, rng.permutation(drawn.searched)):
            classes, expected, used = drawn.classes[ranked[: depth(drawn, 3)]], [], {own}
            for position, found in enumerate(classes):
                if found not in used and len(expected) < 3:
                    expected.append(position)
                    used.add(found)
            assert nearest_of_other_classes(classes, own, 3).tolist() == expected
            assert len(expected) == 3


# ------------------------------------------------------------------------------------------------ the round


@pytest.fixture(scope="module")
def sources(images: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two artifacts that share names, the second with queries, which training leaves out."""
    out = tmp_path_factory.mktemp("again") / "benchmark"
    labels = out.parent / "labels.csv"
    table = Stored.read([artifact.require(images / "benchmark", "ingest")])
    lines = [f"{name},{name.rpartition('/')[2].rpartition('_')[0]}" for name in table.names]
    labels.write_text("\n".join(["name,label", *lines]))
    settings = ingest.IngestConfig(split="train", shard_mb=0.1)
    ingest.run([str(world / "benchmark.tar")], str(out), settings, groundtruth_uri=str(world / "groundtruth.json"),
               labels_uri=str(labels))  # fmt: skip
    return [str(images / "train"), str(out), str(images / "unlabelled")]


@pytest.mark.ray
def test_numbers_are_those_of_the_photos(sources: list[str]) -> None:
    opened = [artifact.require(uri, "ingest") for uri in sources]
    stored, photos = Stored.read(opened), Photos(opened)
    assert any(manifest.counts.get("queries") for _, manifest in opened)  # which have no number
    assert stored.names == [photos[n].name for n in range(len(photos))]
    assert stored.labels == photos.labels
    assert len(stored.names) == sum(len(rows) for *_, rows in stored.shards)


@pytest.mark.ray
def test_a_round(sources: list[str], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negatives are what an exact search by hand finds; a round that was cut off gives the same table."""
    settings = config(queries=12, pool=25, negatives=3, positive="hardest", seed=3)
    work = tmp_path / "round"
    photos = Photos([artifact.require(source, "ingest") for source in sources])
    aside = sorted({label for label in photos.labels if label})[0]
    kept: dict[str, Any] = {}
    embedded = embed.run

    def note(inputs: str, encoder_uri: str, out: str, *rest: Any) -> Any:
        manifest = embedded(inputs, encoder_uri, out, *rest)
        kept["pool"], kept["blocks"] = image_rows(inputs), list(open_embeddings(out).blocks())
        return manifest

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed, "run", note)
        patch.setattr(search, "run", die)
        with pytest.raises(KeyboardInterrupt):
            mine.mine(sources, str(encoder), str(work), 2, settings, without={aside})
    assert {"pool", "embeddings", "queries"} <= {path.name for path in work.iterdir()}
    uri = mine.mine(sources, str(encoder), str(work), 2, settings, without=[aside])
    table = pq.read_table(uri)
    assert [path.name for path in work.iterdir() if any(p.is_file() for p in path.rglob("*"))] == ["tuples"]

    # By hand: all vectors, labels from the photos themselves.
    labels = [None if label == aside else label for label in photos.labels]
    ids = np.concatenate([b.ids for b in kept["blocks"]])
    x = np.concatenate([b.vectors for b in kept["blocks"]]).astype(np.float64)
    drawn = draw([photos[n].name for n in range(len(photos))], labels, 2, settings)
    assert sorted(ids.tolist()) == drawn.searched.tolist()
    for number, label, data in zip(*(kept["pool"][c].to_pylist() for c in ("id", "label", "bytes")), strict=True):
        assert (photos[number].label, photos[number].data.to_pybytes()) == (label, data)
    assert table["query"].to_pylist() == drawn.queries.tolist()
    label_of = [photos.labels[n] for n in ids]
    for line in table.to_pylist():
        assert line["query_name"] == photos[line["query"]].name
        assert line["positive_name"] == photos[line["positive"]].name
        scores = x @ x[ids.tolist().index(line["query"])]
        own = photos.labels[line["query"]]
        same = [n for n in range(len(ids)) if label_of[n] == own and ids[n] != line["query"]]
        if same:
            assert line["positive"] == ids[min(same, key=lambda n: scores[n])]
        else:
            assert photos.labels[line["positive"]] == own
        best: dict[str, int] = {}
        for n in np.argsort(-scores):
            if label_of[n] != own:
                best.setdefault(str(label_of[n]), int(n))
        expected = sorted(best.values(), key=lambda n: -scores[n])[:3]
        assert line["negatives"] == ids[expected].tolist()
        assert line["negative_names"] == [photos[n].name for n in line["negatives"]]
        assert line["negative_scores"] == pytest.approx(scores[expected].tolist(), abs=1e-6)

    # A finished round is not done again, another one not mistaken for it, and its tuples make batches.
    monkeypatch.setattr(embed, "run", die)
    assert mine.mine(sources, str(encoder), str(work), 2, settings, without=[aside]) == uri
    with pytest.raises(MismatchError, match=r"config\.round: 2 there, 3 now"):
        mine.mine(sources, str(encoder), str(work), 3, settings, without=[aside])
    sampler = TupleSampler.read(uri, tuples=4, seed=0)
    assert set(sampler.batch(0)) <= set(range(len(photos)))
    assert sampler.batch_size == 20


@pytest.mark.ray
@pytest.mark.slow
def test_a_large_pool_is_searched_by_an_index(sources: list[str], encoder: Path, tmp_path: Path) -> None:
    """All lists of so small an index are visited and rescored, so its tuples are those of the exact search."""
    tables = []
    for name, rows in (("exact", 1000), ("index", 0)):
        settings = config(queries=10, pool=1000, negatives=3, exact_rows=rows)
        tables.append(pq.read_table(mine.mine(sources, str(encoder), str(tmp_path / name), 0, settings)))
    same = [a == b for a, b in zip(*(table["negatives"].to_pylist() for table in tables), strict=True)]
    assert len(same) == 10
    assert np.mean(same) >= 0.8  # its vectors are float16: near ties may change places
    assert tables[0]["positive"].equals(tables[1]["positive"])


SCRIPT = "import sys; from iir_dist import mine; from iir_dist.train.mining import MiningConfig\n" \
    "mine.mine(sys.argv[3:], sys.argv[1], sys.argv[2], 1, MiningConfig(queries=20, pool=60, negatives=3))"  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("where", ["pool/_work/done/00000.json", "embeddings/_work/done/00000.json", "rankings/_work"])
def test_kill_9(sources: list[str], encoder: Path, tmp_path: Path, where: str) -> None:
    whole = mine.mine(sources, str(encoder), str(tmp_path / "whole"), 1, config())
    work = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(encoder), str(work), *sources], start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (work / where).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    uri = mine.mine(sources, str(encoder), str(work), 1, config())
    assert Path(uri).read_bytes() == Path(whole).read_bytes()
