"""What a collection of some size needs, on paper: machines, hours, money, memory, and what would be in the way.

Everything here is arithmetic on costs of one unit that were measured (`benchmarks/README.md` for CPUs, one H100 for the
network); the text beside each constant says on what. It is right within a factor of two where the measurement is of the
same kind of machine, and says nothing about network and store beyond the bytes that they have to carry.
docs/scaling.md walks through three sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from iir_dist.errors import ConfigError
from iir_dist.index.plan import HNSW_FROM, HNSW_MS, IndexConfig, IndexPlan, K, parse, plan

GB, TB = 1e9, 1e12
CORES = 16
"""Of a machine, with a GPU or without."""

# Costs of one unit.
DECODE_MPX_CORE = 302 * 0.786
"""Megapixels of JPEG a second and core: 302 photos of 768 x 1024 px."""
INGEST_SHARE = 0.87
"""Of decoding alone that ingest reaches a core: two workers are 1.73 times as fast as one process that does the same work."""
FORWARD_MPX, COMPILED_MPX = 844 * 0.786, 1381 * 0.786
"""Megapixels a second through ResNet-50 with GeM on one H100, bf16, 768 x 1024 px; and with embed.compile."""
FORWARD_224 = 12_807
"""The same, photos of 224 x 224 px a second, batches of 256."""
PRETRAIN_FORWARDS, FINETUNE_FORWARDS = 8, 4
"""Forward passes that a step costs a photo: two views, each forward (1) and backward (2) and a momentum network (1); two forward
and one backward pass of the three-stage step."""
VIEWS_CORE = 229
"""Views of 224 px a second and core, decoding included."""
FLOPS_CORE = 5e10
"""Of k-means and of a flat coarse quantizer a core: training 1,000,000 x 256 takes 3.3 s on two."""
KMEANS_ITERATIONS = 10
FILL_SEC = 20e-6
"""Reading, encoding, checking and writing 256 dimensions, one core: 1,000,000 x 256 take 15.3 s on two beside the training."""
FANOUT = 0.7
"""Queries/s over actors against those of one process."""
MEMORY_SHARE = 0.8
"""Of a machine's memory that codes may take."""

# Sizes of what grows with the collection and lies in one process or file.
SHARD_BYTES = 256e6
"""Of an images shard."""
MANIFEST_BYTES = 150
"""Of a shard's line in a manifest."""
NAME_BYTES = 40
"""Of a row's id and name, in memory of the process that writes rankings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """The question.

    image_kb, megapixels: of a photo, on average. scales: pixels of all scales together, in those of one; three scales
    {1, 1/sqrt2, 1/2} are 1.75. compiled: embed with embed.compile. cores: of all machines without a GPU, 16 each; a
    GPU has 16 of its own. memory_gb: of a machine that searches. qps: queries a second. pretrain_seen, finetune_seen:
    photos that go through training, each as often as it is seen. gpu_hour, cpu_hour, tb_month: prices of a machine with
    one GPU, of one without, and of a terabyte.
    """

    images: int
    gpus: int = 8
    cores: int = 128
    dim: int = 512
    image_kb: float = 168.0
    megapixels: float = 0.786
    scales: float = 1.75
    compiled: bool = False
    memory_gb: float = 256.0
    qps: float = 100.0
    pretrain_seen: int = 100_000_000
    finetune_seen: int = 1_000_000
    gpu_hour: float | None = None
    cpu_hour: float | None = None
    tb_month: float | None = None

    @property
    def forward_mpx(self) -> float:
        """Megapixels that one GPU embeds a second."""
        return COMPILED_MPX if self.compiled else FORWARD_MPX


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage needs: machines at work, hours, machine-hours' price (None without prices), and its bottleneck."""

    stage: str
    machines: int
    kind: str
    hours: float
    money: float | None
    bottleneck: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Stages in order, the index, terabytes of each artifact, and what the design does not stand at this size."""

    needs: tuple[Need, ...]
    index: IndexPlan
    search_machines: int
    latency_ms: float
    terabytes: dict[str, float]
    limits: tuple[str, ...]


def size(asked: Sizing, config: IndexConfig | None = None) -> Answer:
    """Answer the question.

    >>> answer = size(Sizing(images=1_000_000, gpus=1))
    >>> [(need.stage, round(need.hours * 60)) for need in answer.needs if need.stage == "embed"]
    [('embed', 35)]

    Raises:
        ConfigError: no index keeps what `config` asks for.
    """
    if asked.images < 1 or asked.gpus < 1 or asked.cores < 1:
        raise ConfigError(f"images, gpus and cores must be 1 or more, got {asked.images}, {asked.gpus}, {asked.cores}")
    todo = plan(asked.images, asked.dim, config or IndexConfig())
    terabytes = {
        "images": asked.images * asked.image_kb * 1e3 / TB,
        "embeddings": asked.images * 2 * asked.dim / TB,
        "index": (todo.search_bytes + asked.images * 2 * asked.dim) / TB,
    }
    machines = search_machines(asked, todo)
    return Answer(
        needs=tuple(_needs(asked, todo)), index=todo, search_machines=machines,
        latency_ms=todo.latency_ms, terabytes=terabytes, limits=tuple(_limits(asked, todo)),
    )  # fmt: skip


def search_machines(asked: Sizing, todo: IndexPlan) -> int:
    """Machines that hold the codes in memory and answer so many queries a second; the larger of the two."""
    for_memory = todo.search_bytes / (asked.memory_gb * GB * MEMORY_SHARE)
    for_speed = asked.qps * todo.latency_ms / 1e3 / (CORES * FANOUT)
    return math.ceil(max(for_memory, for_speed))


def fill_sec(dim: int, nlist: int) -> float:
    """Core seconds to add one vector: to find its list, and all else."""
    coarse = HNSW_MS / 1e3 if nlist >= HNSW_FROM else 2 * nlist * dim / FLOPS_CORE
    return coarse + FILL_SEC * dim / 256


def train_sec(todo: IndexPlan, dim: int, cores: int) -> float:
    """Seconds to train on one machine: k-means over the lists."""
    return 2 * todo.train_size * todo.nlist * dim * KMEANS_ITERATIONS / (FLOPS_CORE * cores)


def _needs(asked: Sizing, todo: IndexPlan) -> Iterator[Need]:
    n, cores, gpus = asked.images, asked.cores, asked.gpus
    cpu_machines = math.ceil(cores / CORES)

    def need(stage: str, kind: str, **seconds: float) -> Need:
        """The slowest of what goes on at the same time decides."""
        bottleneck = max(seconds, key=lambda name: seconds[name])
        machines, price = (gpus, asked.gpu_hour) if kind == "GPU" else (cpu_machines, asked.cpu_hour)
        hours = seconds[bottleneck] / 3600
        return Need(stage, machines, kind, hours, None if price is None else hours * machines * price, bottleneck)

    decode = n * asked.megapixels / DECODE_MPX_CORE
    yield need("ingest", "CPU", decoding=decode / INGEST_SHARE / cores)
    yield need(
        "pretrain", "GPU", network=asked.pretrain_seen * PRETRAIN_FORWARDS / FORWARD_224 / gpus,
        views=asked.pretrain_seen * 2 / VIEWS_CORE / (CORES * gpus),
    )  # fmt: skip
    yield need(
        "finetune", "GPU", network=asked.finetune_seen * asked.megapixels * FINETUNE_FORWARDS / FORWARD_MPX / gpus,
        decoding=asked.finetune_seen * asked.megapixels / DECODE_MPX_CORE / (CORES * gpus),
    )  # fmt: skip
    forward = n * asked.megapixels * asked.scales / asked.forward_mpx
    yield need("embed", "GPU", network=forward / gpus, decoding=decode / (CORES * gpus))
    train, fill = train_sec(todo, asked.dim, min(cores, CORES)), n * fill_sec(asked.dim, todo.nlist) / cores
    slower = "training, on one machine" if train > fill else "finding lists" if todo.nlist >= HNSW_FROM else "adding"
    yield need("index", "CPU", **{slower: train + fill})  # one after the other


def _limits(asked: Sizing, todo: IndexPlan) -> Iterator[str]:
    """Where the design would have to change, in the order in which a run would meet it."""
    n = asked.images
    shards = n * asked.image_kb * 1e3 / SHARD_BYTES
    if shards > 200_000:
        yield (
            f"a manifest of {shards:,.0f} images shards is {shards * MANIFEST_BYTES / 1e6:,.0f} MB of JSON and as many "
            "done-markers are listed at a start: split the collection into artifacts (embed, index and search take several)"
        )
    rate = asked.gpus * asked.forward_mpx / (asked.megapixels * asked.scales)
    if rate * 4 * asked.dim > 200e6:
        yield (
            f"one driver gathers {rate * 4 * asked.dim / 1e6:,.0f} MB/s of vectors while it embeds: one embed job for each part"
        )
    worker = CORES * 4e9
    if todo.build_bytes > worker:
        yield (
            f"training the index holds {todo.build_bytes / GB:,.0f} GB in one process, a machine has {worker / GB:,.0f}: "
            "set index.train_size (39 a list are enough), or train lists of lists"
        )
    if n * NAME_BYTES > worker:
        yield (
            f"ids and names of all rows are {n * NAME_BYTES / GB:,.0f} GB in the process that writes rankings: rankings by id, "
            "names looked up for the few rows that are returned"
        )
    if todo.latency_ms > 1000:
        found = parse(todo.factory, asked.dim)
        scanned = n * todo.nprobe / todo.nlist * found.code_bytes
        yield (
            f"a query scans {scanned / GB:,.1f} GB of codes, {todo.latency_ms / 1e3:,.1f} s of one core: more lists than sqrt(n), "
            f"found in two steps, shorter codes (index.memory_gb), or scans on GPUs"
        )


def table(asked: Sizing, answer: Answer) -> str:
    """The answer as text."""
    todo = answer.index
    priced = asked.gpu_hour is not None or asked.cpu_hour is not None
    lines = [f"{'stage':<10} {'machines':>12} {'hours':>10}{'price':>12}   bottleneck" if priced else
             f"{'stage':<10} {'machines':>12} {'hours':>10}   bottleneck"]  # fmt: skip
    for need in answer.needs:
        money = f"{need.money:>12,.2f}" if need.money is not None else f"{'':>12}" if priced else ""
        lines.append(f"{need.stage:<10} {need.machines:>8} {need.kind} {need.hours:>10.3g}{money}   {need.bottleneck}")
    per_month = answer.search_machines * 730 * asked.cpu_hour if asked.cpu_hour is not None else None
    lines += [
        "",
        f"index      {todo.factory}, nprobe {todo.nprobe}, refine {todo.refine}; {len(todo.ranges):,} shards of at most "
        f"{max(stop - start for start, stop in todo.ranges):,} vectors",
        f"           {todo.search_bytes / GB:,.1f} GB in memory for search, a worker of the build "
        f"{todo.build_bytes / GB:,.1f} GB, trained on {todo.train_size:,} vectors",
        f"search     {answer.search_machines} machines of {CORES} cores and {asked.memory_gb:g} GB for {asked.qps:g} queries/s; "
        f"one core takes {answer.latency_ms:,.1f} ms for a query of {K} answers"
        + (f"; {per_month:,.0f} a month" if per_month is not None else ""),
        "store      " + ", ".join(f"{name} {tb:,.3f} TB" for name, tb in answer.terabytes.items())
        + (f"; {sum(answer.terabytes.values()) * asked.tb_month:,.0f} a month" if asked.tb_month is not None else ""),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"limit      {limit}" for limit in answer.limits)])
