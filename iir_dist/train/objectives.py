"""`[finetune.loss]`: the losses that fine-tuning knows, by name, with their parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from iir_dist.losses.average_precision import FastAP, QuantizedAP, TieAwareAP
from iir_dist.losses.classification import ArcFace
from iir_dist.losses.margin import Contrastive, EuclideanContrastive, MultiSimilarity, Triplet
from iir_dist.losses.pairwise import Objective, Pairwise, WeightedSum
from iir_dist.losses.parameters import Parameters
from iir_dist.losses.ranking import RecallAtK, SmoothAP, SupAP


class QuantizedAPConfig(QuantizedAP):
    """The paper's loss: AP of soft histograms (arXiv:1906.07589)."""

    name: Literal["quantized_ap"] = "quantized_ap"


class TieAwareAPConfig(TieAwareAP):
    """Its tie-aware form, of the released code."""

    name: Literal["tie_aware_ap"] = "tie_aware_ap"


class SmoothAPConfig(SmoothAP):
    """AP of smooth ranks (arXiv:2007.12163)."""

    name: Literal["smooth_ap"] = "smooth_ap"


class SupAPConfig(SupAP):
    """ROADMAP: (1 - calibration) SupAP + calibration x contrastive (arXiv:2110.01445)."""

    name: Literal["sup_ap"] = "sup_ap"
    calibration: float = Field(0.5, ge=0, le=1)
    """lambda; 0.5 (1:1) in the released code, 0.1 in that of the extended version, 0 for SupAP alone."""
    positive_margin: float = Contrastive().positive_margin
    negative_margin: float = Contrastive().negative_margin


class FastAPConfig(FastAP):
    """AP of a histogram of distances (CVPR 2019, doi:10.1109/CVPR.2019.00196)."""

    name: Literal["fast_ap"] = "fast_ap"


class RecallAtKConfig(RecallAtK):
    """Recall@k of smooth ranks (arXiv:2108.11179)."""

    name: Literal["recall_at_k"] = "recall_at_k"


class ContrastiveConfig(Contrastive):
    """Pairs with margins on the cosine."""

    name: Literal["contrastive"] = "contrastive"


class EuclideanContrastiveConfig(EuclideanContrastive):
    """Pairs with a margin on the distance (arXiv:1711.02512)."""

    name: Literal["euclidean_contrastive"] = "euclidean_contrastive"


class TripletConfig(Triplet):
    """Triplets, mined within the batch."""

    name: Literal["triplet"] = "triplet"


class MultiSimilarityConfig(MultiSimilarity):
    """Mined pairs with soft weights (arXiv:1904.06627)."""

    name: Literal["multi_similarity"] = "multi_similarity"


class ArcFaceConfig(Parameters):
    """Classification with an angular margin (arXiv:1801.07698). Not an objective itself: its class vectors are learnt."""

    name: Literal["arcface"] = "arcface"
    margin: float = Field(0.3, ge=0, lt=1.5)
    """Radians; 0.5 in the paper, for faces."""
    scale: float = Field(32.0, gt=0)
    """64 in the paper."""


def _named(value: Any) -> Any:
    """A table without a name is one of the default loss."""
    return {"name": "quantized_ap", **value} if isinstance(value, dict) else value


LossConfig = Annotated[
    Annotated[
        QuantizedAPConfig
        | TieAwareAPConfig
        | SmoothAPConfig
        | SupAPConfig
        | FastAPConfig
        | RecallAtKConfig
        | ContrastiveConfig
        | EuclideanContrastiveConfig
        | TripletConfig
        | MultiSimilarityConfig
        | ArcFaceConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(_named),
]
"""One of them, chosen by `name`: `--set loss.name=smooth_ap --set loss.temperature=0.02`."""


def build(config: LossConfig, num_classes: int, dim: int, seed: int) -> Objective:
    """The objective of a config.

    Args:
        num_classes: labels are 0..num_classes-1, or -1.
        dim: of the vectors.
        seed: of what an objective learns. One that learns is an `nn.Module`, at present `ArcFace`; see there.
    """
    match config:
        case ArcFaceConfig():
            return ArcFace(num_classes, dim, config.margin, config.scale, seed)
        case SupAPConfig():
            margins = Contrastive(positive_margin=config.positive_margin, negative_margin=config.negative_margin)
            return WeightedSum(((1 - config.calibration, Pairwise(config)), (config.calibration, margins)))
        case ContrastiveConfig() | EuclideanContrastiveConfig():
            return config
        case _:
            return Pairwise(config)
