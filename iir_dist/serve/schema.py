"""What is asked and answered, as JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_K = 1000
MAX_REFINE = 200
Id = Annotated[int, Field(ge=0, le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Side = Literal["160", "320", "640", "1280"]
"""px of the long side of a small copy; few sizes, so that the cache holds what is asked for."""
Reranker = Literal["qe", "dba", "diffusion", "superglobal"]


def _numbers(value: Any) -> Any:
    """`1,2,3,4`, alone or as the only value of a parameter, is four numbers."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.split(",") if isinstance(value, str) else value


class Settings(BaseModel):
    """How to search. Without `recall`, `nprobe` or `exact` the index's own operating point is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    k: int = Field(50, ge=1, le=MAX_K, description="Length of the list.")
    box: list[float] | None = Field(
        None,
        description="x1, y1, x2, y2 in px of the upright photo: search with this part of it. In a URL: box=1,2,3,4.",
    )
    recall: float | None = Field(
        None, gt=0, le=1, description="The cheapest operating point that reaches this recall@10."
    )
    nprobe: int | None = Field(None, ge=1, description="Lists of the index that are visited.")
    refine: int | None = Field(
        None, ge=0, le=MAX_REFINE, description="The best refine * k by code are compared exactly."
    )
    exact: bool = Field(False, description="Compare with every row; for small indexes.")
    rerank: Reranker | None = Field(None, description="Re-rank the first of the list by what they have in common.")
    depth: int = Field(200, ge=2, le=MAX_K, description="How many are re-ranked.")
    splits: list[str] = Field([], max_length=16, description="Only rows of these splits.")
    prefix: str = Field("", max_length=200, description="Only rows whose name begins so.")

    @model_validator(mode="before")
    @classmethod
    def _read_box(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("box") is not None:
            values = {**values, "box": _numbers(values["box"])}
        return values

    @model_validator(mode="after")
    def _one_point(self) -> Settings:
        given = [
            name
            for name, value in (
                ("recall", self.recall is not None),
                ("nprobe and refine", self.nprobe is not None or self.refine is not None),
                ("exact", self.exact),
            )
            if value
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; expected one of them")
        if self.box is not None and (len(self.box) != 4 or not all(abs(v) < 1e6 for v in self.box)):
            raise ValueError("box: expected four numbers x1, y1, x2, y2 in px")
        return self


class Reference(Settings):
    """A search that brings no photo: by the id or the name of a stored one, or by a vector."""

    id: Id | None = None
    name: str | None = Field(None, max_length=4096)
    vector: list[Finite] | None = Field(None, min_length=1, max_length=2**16)

    @model_validator(mode="after")
    def _one_query(self) -> Reference:
        if sum(value is not None for value in (self.id, self.name, self.vector)) != 1:
            raise ValueError("expected exactly one of id, name and vector")
        if self.vector is not None and self.box is not None:
            raise ValueError("box: a vector has no part to cut out")
        return self


class Hit(BaseModel):
    """One row of the answer."""

    rank: int
    id: int
    name: str
    split: str | None
    score: float = Field(description="Inner product of unit vectors, larger is better; a re-ranker's own scale.")
    width: int | None = Field(description="px of the upright photo; null where the photo is not stored.")
    height: int | None


class Asked(BaseModel):
    """What was searched with."""

    kind: Literal["photo", "stored", "vector"]
    id: int | None = None
    name: str | None = None
    width: int | None = None
    height: int | None = None
    box: list[float] | None = None


class Used(BaseModel):
    """How it was searched."""

    nprobe: int | None
    refine: int | None
    exact: bool
    rerank: str | None
    rows: int = Field(description="Rows that were searched in.")
    recall: dict[str, float] = Field(
        description="Recall@10 measured with these settings, by kind of query; {} if unknown."
    )


class Answer(BaseModel):
    """The list, best first, and what it took."""

    index: str = Field(description="Fingerprint of the version that answered.")
    query: Asked
    used: Used
    steps_ms: dict[str, float] = Field(
        description="queue, decode, embed, coarse, scan, refine, rerank; without what was not done."
    )
    total_ms: float
    hits: list[Hit]


class PointInfo(BaseModel):
    """One operating point of the index."""

    nprobe: int
    refine: int
    recall: dict[str, float] = Field(description="Recall@10 by kind of query.")
    latency_ms: float = Field(description="Median of single queries, when it was measured.")


class Limits(BaseModel):
    """What a request may cost."""

    upload_bytes: int
    max_megapixels: float
    k: int = MAX_K
    exact_rows: int


class IndexInfo(BaseModel):
    """The version of the index that is searched now."""

    name: str
    fingerprint: str
    created: str
    rows: int
    dim: int
    factory: str
    shards: int
    splits: dict[str, int]
    encoder: str | None = Field(description="Its backbone; null where photos cannot be searched with.")
    photos: int = Field(description="Rows whose photo is stored.")
    exact: bool = Field(description="Whether it is small enough to be searched exactly.")
    default: dict[str, int] = Field(description="nprobe and refine where nothing is said.")
    points: list[PointInfo]
    points_stale: bool = Field(description="Whether the rows have changed since recall was measured.")
    rerankers: list[str]
    limits: Limits
    trouble: str | None = Field(description="Why a newer version could not be opened.")


class Problem(BaseModel):
    """What every error looks like."""

    type: str
    message: str


class Failure(BaseModel):
    """The body of every answer that is not 2xx."""

    error: Problem
