"""A small collection to serve: photos of procedural landmarks, a tiny random network, an index; and a server over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import indexed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from iir_dist import artifact
from iir_dist.artifact import InputRef
from iir_dist.config import StageConfig
from iir_dist.data import synthetic
from iir_dist.data.images import decode, prepare
from iir_dist.index import points
from iir_dist.ingest import SCHEMA
from iir_dist.models.encoder import EncoderConfig
from iir_dist.models.encoder import run as make_encoder

SIZE = 48
VIEWS = 6
WORLD = synthetic.World(side=160, seed=3)


class Collection(NamedTuple):
    """Folders, and the photos by name."""

    index: Path
    images: Path
    encoder: Path
    photos: dict[str, bytes]


def photos(landmarks: int = 4, views: int = VIEWS) -> dict[str, bytes]:
    """JPEGs by name."""
    found = {}
    for landmark in range(landmarks):
        drawing = synthetic.facade(WORLD.seed, landmark)
        for view in range(views):
            out = io.BytesIO()
            synthetic.shoot(WORLD, 0, landmark, view, drawing).image.save(out, "JPEG", quality=88)
            found[f"landmark_{landmark}/view_{view}"] = out.getvalue()
    return found


def make(root: Path) -> Collection:
    """Everything that `iir serve` needs, below `root`."""
    found = photos()
    make_encoder(
        str(root / "encoder"), EncoderConfig(backbone="timm:test_resnet", weights="random", size=SIZE, resize="squash")
    )
    write_images(root / "images", found)
    x = embedded(root / "encoder", found)
    fingerprint = artifact.require(root / "encoder", "encoder")[1].fingerprint
    images = artifact.reference(*artifact.require(root / "images", "ingest"))
    write_embeddings(root / "embeddings", x, list(found), fingerprint, images)
    indexed.make_index(root / "index", [root / "embeddings"], "IVF4,Flat", cuts=[10], nprobe=2, refine=2)
    measured(root / "index")
    return Collection(root / "index", root / "images", root / "encoder", found)


def write_images(folder: Path, found: Mapping[str, bytes]) -> None:
    """An images artifact in two shards; one row is a query of a name that a database image has too."""
    rows: list[dict[str, Any]] = []
    first = next(iter(found))
    for name, split in [(first, "query"), *((name, "db") for name in found)]:
        data = found[name] if split == "db" else found[list(found)[-1]]
        width, height = Image.open(io.BytesIO(data)).size
        rows.append(
            {
                "id": len(rows), "name": name, "label": None, "split": split, "box": None, "width": width, "height": height,
                "sha256": hashlib.sha256(data).hexdigest(), "bytes": data,
            }
        )  # fmt: skip
    with artifact.begin(folder, "ingest", StageConfig(), {}) as work:
        for number, part in enumerate((rows[:9], rows[9:])):
            name = artifact.shard_name(number)
            with work.folder.publish(name) as file:
                pq.write_table(
                    pa.Table.from_pylist(part, schema=SCHEMA), file.path, row_group_size=4, compression="none"
                )
            artifact.commit(work.folder, number, {name: artifact.entry_of(file)})
        work.publish({"out": len(rows)})


def embedded(encoder: Path, found: Mapping[str, bytes]) -> Any:
    """(n, d) vectors, each photo alone."""
    import torch

    from iir_dist.models.encoder import load

    network = load(*artifact.require(encoder, "encoder"))
    with torch.inference_mode():
        pixels = [torch.from_numpy(prepare(decode(data), SIZE, "squash").copy()) for data in found.values()]
        return torch.cat([network(p.permute(2, 0, 1)[None].float() / 255) for p in pixels]).numpy()


def write_embeddings(folder: Path, x: Any, names: list[str], encoder: str, images: InputRef) -> None:
    """An embeddings artifact; landmarks 0 and 1 are of split db, the others distractors."""
    splits = ["distractor" if name[9] in "23" else "db" for name in names]
    columns = {
        "id": np.arange(len(x)), "name": names, "split": splits,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
    }  # fmt: skip
    with artifact.begin(folder, "embed", StageConfig(), {"images": images}) as work:
        with work.folder.publish("shard-00000.parquet") as file:
            pq.write_table(pa.table(columns, schema=indexed.schema(x.shape[1])), file.path)
        artifact.commit(work.folder, 0, {"shard-00000.parquet": artifact.entry_of(file)})
        work.publish({"out": len(x)}, info={"encoder_fingerprint": encoder, "encoder": {"name": encoder}})


def measured(index: Path) -> None:
    """Add operating points that look like measured ones."""
    folder, manifest = artifact.require(index, "index")
    found = points.OperatingPoints(
        queries={"database": 24}, rows=24, threads=1, memory_bytes={"index": 1, "vectors": 1},
        points=[
            points.Point(
                nprobe=nprobe, refine=refine, recall={"database": {1: r, 10: r, 100: r}}, cost_ms=nprobe, queries_per_sec=1,
                latency_ms=points.Latency(p50=0.1 * nprobe, p95=0.2 * nprobe, p99=0.3 * nprobe),
            )
            for nprobe, refine, r in ((1, 1, 0.7), (2, 2, 0.9), (4, 4, 1.0))
        ],
    )  # fmt: skip
    files = {**manifest.files, **points.write_points(folder, found)}
    changed = manifest.model_copy(update={"files": dict(sorted(files.items()))})
    folder.write(artifact.MANIFEST, changed.model_dump_json().encode())


# ------------------------------------------------------------------------------------------------ over HTTP


class Reply(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The type of the error."""
        return str(self.json["error"]["type"])


class Http(NamedTuple):
    """Asks a server, with no help of a library that would tidy up what is asked."""

    port: int

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request; a dict is sent as JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body, named = json.dumps(body).encode(), {"content-type": "application/json", **named}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def search(self, body: Any, query: str = "", **headers: str) -> Reply:
        """POST /v1/search."""
        return self("POST", "/v1/search" + query, body, **headers)


@contextlib.contextmanager
def serving(collection: Collection, token: str | None = None, **settings: Any) -> Iterator[tuple[Http, Any]]:
    """A real server on a free port of loopback, in a thread; and its service."""
    from iir_dist.serve import app, local
    from iir_dist.serve.config import ServeConfig
    from iir_dist.serve.service import Service

    config = ServeConfig.model_validate({"threads": 1, "poll_sec": 3600, **settings})
    service = Service(str(collection.index), config, [str(collection.images)], str(collection.encoder))
    server = local.server(app.build(service, token), config.upload_sec)
    with local.listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        port = sock.getsockname()[1]
        _wait(port)
        try:
            yield Http(port), service
        finally:
            server.should_exit = True
            thread.join(timeout=60)


def _wait(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            if sock.recv(12) == b"HTTP/1.1 200":
                return
        time.sleep(0.05)
    raise AssertionError("the server did not come up")
