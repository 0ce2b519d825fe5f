"""From what is wanted of an index to its parameters; pure arithmetic, printed before the build.

The rules and their reasons (measured with faiss 1.15 on two cores of an AVX-512 server, inner product, recall of the
true 10 nearest; benchmarks and training confirm or refuse them for the data at hand):

* **Codes: product quantization with 4 bits for 2 dimensions, residual, in fast-scan layout** (`PQ128x4fsr` for 256
  dimensions, 64 bytes). It keeps as much as 8-bit PQ of the same size (0.985 against 0.987 at refine 4, 0.998 both at
  refine 8), scans 3 to 8 times as fast and trains 10 times as fast. Whatever search needs works with it: preassigned
  lists, selectors, merging, removal, mapping into memory (`IO_FLAG_MMAP_IFC`; the older `IO_FLAG_MMAP` reads a copy).
  One thing differs: its scores are sums of bytes, so candidates tie. A cut among ties is decided by the order of
  visits; shards answer as one only if all that tie with the last candidate are left out.
* **4 and 8 dimensions for 4 bits where memory is short**; refinement from float16 vectors makes up for it, by more
  candidates. Others are not planned, only taken by `factory`: 8-bit PQ is slower at the same size; RaBitQ of one bit is
  a quarter larger than codes of 4 dimensions, keeps a little more and scans at a third of the speed; SQ8 takes 4 times
  the memory of the codes and keeps what refinement gives back anyway.
* **nlist: the power of two next to sqrt(n).** Scanning is cheap, so lists may be long; with more lists, training and
  adding (both nlist x d a vector) cost more, and the blocks of 32 codes that fast-scan pads lists to take more room.
* **A flat coarse quantizer up to 8,192 lists, HNSW above**, where a query would read more than the caches hold.
* **Sets below 1,024 vectors are scanned exactly:** too few to train on, nothing to gain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from iir_dist.config import StageConfig
from iir_dist.errors import ConfigError

MB, GB = 2**20, 2**30
MIN_POINTS_PER_CENTROID = 39
"""Fewer training vectors a centroid make k-means unreliable (faiss's own bound for its warning)."""
POINTS_PER_CENTROID = 50
"""Vectors sampled for each list; more cost time and change nothing."""
TRAIN_ROWS = 65_536
"""Vectors sampled at least: what faiss trains a product quantizer on."""
EXACT_BELOW = 1024
"""Smaller sets are scanned exactly."""
FLAT_DIMS = 16
"""Vectors of fewer dimensions are no larger than codes and id; they are kept as they are."""
HNSW_FROM = 16_384
"""Lists from which on the nearest are found by a graph."""
SHARD_BYTES = 4 * GB
"""Codes, ids and float16 vectors of a shard at most: what is written, verified and, after a kill, written again."""
BLOCK = 32
"""Codes that fast-scan packs together; the last block of a list is padded, by half a block on average."""
ADD_ROWS = 65_536
"""Vectors that are transformed and added at a time."""

# What a process holds, beside its data; measured.
PROCESS = 430 * MB
"""A Ray worker with NumPy, Arrow and faiss."""
BLOCK_COPIES = 4
"""Copies of an embeddings shard in memory while it is read: Arrow's, the matrix, and temporaries of the checks."""

# Speed of one thread, warm; orders of magnitude that the latency bound is checked against, not promises.
FIXED_MS = 0.1
COARSE_BYTES_MS = 10e6
"""Centroids compared, in bytes a millisecond."""
HNSW_MS = 0.3
SCAN_BYTES_MS = {"fs": 4e6, "PQ": 1.5e6, "other": 6e6}
"""Codes scanned, in bytes a millisecond."""
RESCORE_BYTES_MS = 1e6
"""float16 vectors rescored, in bytes a millisecond."""
K = 10
"""Depth that recall and latency are planned for."""

REFINE = (1, 2, 4, 8, 16, 32, 64)
KEPT = {
    2.0: (0.69, 0.90, 0.98, 0.997, 0.999, 0.9995, 0.9995),
    1.0: (0.49, 0.68, 0.84, 0.93, 0.97, 0.985, 0.995),
    0.5: (0.33, 0.48, 0.65, 0.79, 0.89, 0.94, 0.97),
}
"""Share of the true 10 nearest among the first 10 * REFINE by code, all lists visited; by bits a dimension."""
STEPS = (2, 4, 8)
"""Dimensions that 4 bits stand for, in order of preference."""


class IndexConfig(StageConfig):
    """`[index]`."""

    recall: float = Field(0.95, gt=0, le=0.999)
    """Of the true 10 nearest, in the answers' first 10: what nprobe and refine are planned for."""
    memory_gb: float | None = Field(None, gt=0)
    """What search may hold in memory, in GB of 2**30 bytes: codes, ids and centroids. float16 vectors stay on disk."""
    latency_ms: float | None = Field(None, gt=0)
    """Median time of a single query of 10 answers on one thread, all in memory."""
    shards: int | None = Field(None, ge=1)
    """Index shards, units of build, retry, checksum and search; of at most 4 GB where not set."""
    factory: str | None = None
    """A faiss factory string in place of the planned one; an IVF index, optionally behind one OPQ or PCA."""
    nprobe: int | None = Field(None, ge=1)
    """Lists visited for a query where the search names none; planned where not set."""
    refine: int | None = Field(None, ge=0)
    """The best refine * k candidates are rescored from float16 vectors, 0 keeps the codes' scores; planned where not set."""
    train_size: int | None = Field(None, ge=256)
    """Vectors that the index is trained on, sampled over all rows; planned where not set."""
    seed: int = 0
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Factory:
    """What a faiss factory string says, read without faiss; training has faiss check it.

    dim: of the vectors after the transforms. hnsw: links of an HNSW coarse quantizer, 0 for a flat one.
    codebook_bytes: transforms and codebooks. bits: of a code for each dimension of the input.
    """

    text: str
    dim: int
    nlist: int
    hnsw: int
    code: str
    code_bytes: int
    transform_bytes: int
    bits: float

    @property
    def fast_scan(self) -> bool:
        """Whether codes lie in blocks of 32."""
        return "fs" in self.code

    def file_bytes(self, rows: int, shards: int) -> int:
        """Codes, ids and template of all shards: what search maps into memory, and the size of the files.

        rows * (code + 8) + shards * (nlist * (4 * dim + 16 + links + padding) + transform), where links are 8 * M + 16
        bytes of an HNSW graph with M links, and padding is half a block of codes.
        """
        links = 8 * self.hnsw + 16 if self.hnsw else 0
        padding = BLOCK // 2 * self.code_bytes if self.fast_scan else 0
        codebook = (2 ** (4 if "x4" in self.code else 8)) * 4 * self.dim if self.code.startswith("PQ") else 0
        template = self.nlist * (4 * self.dim + 16 + links) + self.transform_bytes + codebook
        return rows * (self.code_bytes + 8) + shards * (template + min(self.nlist, rows) * padding)

    def build_bytes(self, dim: int, train_size: int, shard_rows: int, block_rows: int) -> int:
        """Peak memory of one worker of the build, the larger of two.

        Training holds the sample, its transform and three times as much inside of k-means: 4 * train_size * (dim + 4 * dim').
        Filling holds the shard, whose lists grow by doubling: 2 * its file. Both read embeddings shards of `block_rows`,
        in BLOCK_COPIES copies, and are processes.
        """
        reading = BLOCK_COPIES * 4 * dim * block_rows
        training = 4 * train_size * (dim + 4 * self.dim)
        filling = 2 * self.file_bytes(shard_rows, 1) + 3 * 4 * self.dim * min(ADD_ROWS, block_rows)
        return PROCESS + reading + max(training, filling)

    def latency_ms(self, rows: int, dim: int, nprobe: int, refine: int) -> float:
        """Coarse search, scan of nprobe lists of average length, and rescoring of K * refine vectors."""
        kind = "fs" if self.fast_scan else "PQ" if self.code.startswith("PQ") else "other"
        coarse = HNSW_MS if self.hnsw else self.nlist * 4 * self.dim / COARSE_BYTES_MS
        scan = rows * nprobe / self.nlist * self.code_bytes / SCAN_BYTES_MS[kind]
        return FIXED_MS + coarse + scan + K * refine * 2 * dim / RESCORE_BYTES_MS


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Parameters of one index and what it will take. `ranges` are the database rows [start, stop) of each shard."""

    factory: str
    nlist: int
    nprobe: int
    refine: int
    code_bytes: int
    train_size: int
    ranges: tuple[tuple[int, int], ...]
    search_bytes: int
    """That search maps into memory: the faiss files."""
    build_bytes: int
    """Peak of one worker of the build."""
    latency_ms: float
    """Of a single query, roughly."""

    def summary(self, num_rows: int, dim: int) -> str:
        """One line for the log, with bytes a vector on disk (code + 8 for the id, and float16 for refinement)."""
        return (
            f"{self.factory} over {num_rows} x {dim}: {len(self.ranges)} shards, {self.code_bytes} + 8 B a vector in the "
            f"index and {2 * dim} B for refinement, trained on {self.train_size}, nprobe {self.nprobe}, refine "
            f"{self.refine}; search holds {self.search_bytes / MB:,.0f} MB, a worker of the build "
            f"{self.build_bytes / MB:,.0f} MB; about {self.latency_ms:.2g} ms a query"
        )


def plan(num_rows: int, dim: int, config: IndexConfig, block_rows: int = ADD_ROWS) -> IndexPlan:
    """Choose an index: the first of the rules' choices that reaches the recall within memory and latency.

    nprobe is a first guess, 2 * sqrt(nlist) lists for recall 0.95 and in proportion to 1 / (1 - recall); what it reaches
    is measured on the finished index. refine is the smallest at which no more than half of the allowed misses are the
    codes'.

    Args:
        num_rows, dim: of the database.
        block_rows: rows of the largest embeddings shard; readers hold one.

    Raises:
        ConfigError: a bound cannot be kept; the message names the nearest one that can.

    >>> plan(1_000_000, 256, IndexConfig()).factory
    'IVF1024,PQ128x4fsr'
    >>> plan(1_000_000, 256, IndexConfig(memory_gb=0.045)).factory
    'IVF1024,PQ64x4fsr'
    >>> plan(500, 256, IndexConfig()).factory
    'IVF1,Flat'
    >>> plan(1_000_000, 256, IndexConfig(memory_gb=0.01))
    Traceback (most recent call last):
    iir_dist.errors.ConfigError: index.memory_gb = 0.01 is too little ...
    """
    plans = list(_plans(num_rows, dim, config, block_rows))
    memory = math.inf if config.memory_gb is None else config.memory_gb * GB
    latency = math.inf if config.latency_ms is None else config.latency_ms
    fitting = [p for p in plans if p.search_bytes <= memory]
    if not fitting:
        least = min(p.search_bytes for p in plans)
        raise ConfigError(
            f"index.memory_gb = {config.memory_gb:g} is too little for {num_rows} x {dim} at recall {config.recall:g}; "
            f"expected at least index.memory_gb={_up(least / GB)}"
        )
    quick = [p for p in fitting if p.latency_ms <= latency]
    if not quick:
        least_ms = min(p.latency_ms for p in fitting)
        raise ConfigError(
            f"index.latency_ms = {config.latency_ms:g} is too short for {num_rows} x {dim} at recall {config.recall:g}; "
            f"expected at least index.latency_ms={_up(least_ms)}, a lower index.recall, or more memory"
        )
    return quick[0]


def _plans(n: int, dim: int, config: IndexConfig, block_rows: int) -> Iterator[IndexPlan]:
    """The choices that reach the recall, best first, each with all that follows from it."""
    for number, text in enumerate(_factories(n, dim, config)):
        found = parse(text, dim)
        needed = refine_for(found.bits, config.recall)
        refine = config.refine if config.refine is not None else REFINE[-1] if needed is None else needed
        if number and (needed is None or needed > refine):
            continue
        nprobe = math.ceil(2 * math.sqrt(found.nlist) * 0.05 / (1 - config.recall))
        nprobe = min(found.nlist, config.nprobe or max(8, nprobe))
        train_size = min(n, config.train_size or max(TRAIN_ROWS, POINTS_PER_CENTROID * found.nlist))
        shards = min(n, config.shards or math.ceil(n * (found.code_bytes + 8 + 2 * dim) / SHARD_BYTES))
        cuts = [n * i // shards for i in range(shards + 1)]
        yield IndexPlan(
            factory=found.text, nlist=found.nlist, nprobe=nprobe, refine=refine, code_bytes=found.code_bytes,
            train_size=train_size, ranges=tuple(pairwise(cuts)), search_bytes=found.file_bytes(n, shards),
            build_bytes=found.build_bytes(dim, train_size, math.ceil(n / shards), min(block_rows, n)),
            latency_ms=found.latency_ms(n, dim, nprobe, refine),
        )  # fmt: skip


def _factories(n: int, dim: int, config: IndexConfig) -> Iterator[str]:
    if config.factory is not None:
        yield config.factory
        return
    nlist = _lists(n, min(n, config.train_size or n))
    coarse = f"IVF{nlist}_HNSW32" if nlist >= HNSW_FROM else f"IVF{nlist}"
    if n < EXACT_BELOW or dim < FLAT_DIMS:
        yield f"{coarse},Flat"
        return
    for step in STEPS:
        m = math.ceil(dim / step)
        padding = f"Pad{m * step}," if dim % step else ""
        yield f"{padding}{coarse},PQ{m}x4fsr"


def _lists(n: int, train_size: int) -> int:
    if n < EXACT_BELOW:
        return 1
    nlist: int = 2 ** round(math.log2(math.sqrt(n)))
    while nlist * MIN_POINTS_PER_CENTROID > train_size and nlist > 1:
        nlist //= 2
    return nlist


def refine_for(bits: float, recall: float) -> int | None:
    """The smallest refine at which codes of so many bits a dimension lose no more than half of the allowed misses.

    0 where codes are the vectors themselves, None where 64 is not enough.

    >>> refine_for(2, 0.95), refine_for(1, 0.95), refine_for(0.5, 0.95), refine_for(32, 0.95)
    (4, 32, None, 0)
    """
    if bits >= 32:
        return 0
    kept = KEPT[max((b for b in KEPT if b <= bits), default=min(KEPT))]
    return next((r for r, share in zip(REFINE, kept, strict=True) if share >= 1 - (1 - recall) / 2), None)


_TRANSFORM = re.compile(r"(?:OPQ\d+(?:_(?P<opq>\d+))?|PCAW?R?(?P<pca>\d+)|RR(?P<rr>\d+)?|Pad(?P<pad>\d+)|L2[nN]orm)")
_COARSE = re.compile(r"IVF(?P<nlist>\d+)(?P<unit>[kM]?)(?:_HNSW(?P<links>\d*)|\(HNSW(?P<inner>\d*)[^)]*\)|\(Flat\))?")
_CODE = re.compile(
    r"Flat|SQ(?P<sq>4|6|8|fp16|bf16)|PQ(?P<m>\d+)(?:x(?P<pqbits>\d+))?(?P<fs>fsr?(?:_\d+)?)?(?P<np>np)?"
    r"|RaBitQ(?P<rabitq>\d*)(?:fs(?:_\d+)?)?"
)


def parse(factory: str, dim: int) -> Factory:
    """Read a factory string. 8-bit product quantizers get `np`: polysemous training, faiss's default, costs twenty times
    the rest of the training and is not used.

    Raises:
        ConfigError: it is no IVF index, or its codes are of a kind that has no plan.

    >>> parse("OPQ32_128,IVF4096_HNSW32,PQ32", 512)
    Factory(text='OPQ32_128,IVF4096_HNSW32,PQ32np', dim=128, nlist=4096, hnsw=32, code='PQ32np', code_bytes=32, ...
    """
    parts = factory.split(",")
    coarse = _COARSE.fullmatch(parts[-2]) if len(parts) > 1 else None
    code = _CODE.fullmatch(parts[-1])
    transforms = [_TRANSFORM.fullmatch(part) for part in parts[:-2]]
    if coarse is None or not all(transforms):
        raise ConfigError(
            f"index.factory = {factory!r}: expected an IVF index behind OPQ, PCA, RR, Pad or L2norm, for example "
            "IVF1024,PQ128x4fsr or OPQ32_128,IVF1024_HNSW32,PQ32np"
        )
    if code is None:
        raise ConfigError(
            f"index.factory = {factory!r}: expected codes Flat, SQ4 to SQ8, SQfp16, SQbf16, PQ (8 bits np, x4fs, x4fsr) or "
            f"RaBitQ, got {parts[-1]!r}; refinement is set by index.refine"
        )
    inner, transform_bytes = dim, 0
    for found in transforms:
        assert found is not None
        outer, given = inner, next((g for g in found.groups() if g), None)
        inner = int(given) if given else outer
        if found[0][:2] in ("OP", "PC", "RR"):
            transform_bytes += 4 * outer * inner
    nlist = int(coarse["nlist"]) * {"": 1, "k": 2**10, "M": 2**20}[coarse["unit"]]
    if nlist < 1:
        raise ConfigError(f"index.factory = {factory!r}: expected at least one list")
    links = coarse["links"] if coarse["links"] is not None else coarse["inner"]
    name = code[0]
    if code["m"] and not (code["fs"] or code["np"]):
        name += "np"
    code_bytes = _code_bytes(code, inner)
    return Factory(
        text=",".join([*parts[:-1], name]), dim=inner, nlist=nlist, hnsw=0 if links is None else int(links or 32), code=name,
        code_bytes=code_bytes, transform_bytes=transform_bytes,
        bits=32.0 if name == "Flat" and inner == dim else 8 * code_bytes / dim,
    )  # fmt: skip


def _code_bytes(code: re.Match[str], dim: int) -> int:
    if code["sq"]:
        return math.ceil(dim * {"4": 4, "6": 6, "8": 8, "fp16": 16, "bf16": 16}[code["sq"]] / 8)
    if code["m"]:
        m, bits = int(code["m"]), int(code["pqbits"] or 8)
        return math.ceil((m + m % 2 if code["fs"] else m) * bits / 8)
    if code["rabitq"] is not None:
        bits = int(code["rabitq"] or 1)
        return math.ceil(dim * bits / 8) + (8 if bits == 1 else 20)
    return 4 * dim


def _up(value: float) -> str:
    """Four digits, not below the value.

    >>> _up(0.0123456), _up(2.0)
    ('0.01235', '2.001')
    """
    digits = 3 - math.floor(math.log10(value))
    return f"{math.ceil(value * (1 + 1e-9) * 10.0**digits) / 10.0**digits:.12g}"
