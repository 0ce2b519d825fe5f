"""DINO: self-distillation with a centred, sharpened teacher (Caron et al., ICCV 2021, arXiv:2104.14294)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from iir_dist.data.augment import DINO_GLOBAL_1, DINO_GLOBAL_2, DINO_LOCAL
from iir_dist.losses.distillation import dino, next_centre
from iir_dist.train.methods.method import Context, Method, MethodConfig, Pass, random_units, to_one, unit


class DINOConfig(MethodConfig):
    """DINO (arXiv:2104.14294). For ViTs take optim.optimizer=adamw, lr 5e-4 per 256, weight decay 0.04 and pooling cls."""

    name: Literal["dino"] = "dino"
    prototypes: int = Field(65_536, ge=2)
    """Outputs of the last layer, K; 60,000 for ResNet-50."""
    hidden: int = Field(2048, ge=2)
    bottleneck: int = Field(256, ge=2)
    """Unit vectors of this dimension come before the last layer."""
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the teacher, at the start; it rises to 1."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    local_views: int = Field(8, ge=0)
    """Small crops beside the two large ones."""
    freeze_last: int = Field(0, ge=0)
    """Steps in which the last layer stays (the authors: the first epoch)."""
    optimization: ClassVar[dict[str, Any]] = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4}


class _Teacher:
    """The teacher's last layer, which follows the student's, and the centre of its outputs."""

    def __init__(self, last: Tensor) -> None:
        self.last, self.centre = last.detach().clone(), torch.zeros(len(last))

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last.copy_(state["last"])
        self.centre.copy_(state["centre"])


class DINO(Method):
    """The last layer (unit rows, no bias) is the loss's own; what is gathered is the small vector before it.

    The teacher's trunk is the result, as in the authors' evaluation.
    """

    published = "target.encoder"
    remedy = "lower method.teacher_temperature or method.centre_momentum, or set method.freeze_last to an epoch"

    def __init__(self, config: DINOConfig, context: Context) -> None:
        self.config, self.steps = config, context.steps
        local = config.local_views
        large = (context.recipe(DINO_GLOBAL_1), context.recipe(DINO_GLOBAL_2))
        self.recipes = large + (context.recipe(DINO_LOCAL, local=True),) * local
        self.passes = (Pass((0, 1), target=True),) + ((Pass(tuple(range(2, 2 + local))),) if local else ())
        h = config.hidden
        self.head = nn.Sequential(
            nn.Linear(context.width, h), nn.GELU(), nn.Linear(h, h), nn.GELU(), nn.Linear(h, config.bottleneck)
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.weights = nn.Module()
        self.weights.last = nn.Parameter(random_units(config.prototypes, config.bottleneck, context.seed))
        self.memory: _Teacher = _Teacher(self.weights.last)

    def momentum(self, step: int) -> float:
        """See `Method`."""
        return to_one(self.config.momentum, step, self.steps)

    def trains_weights(self, step: int) -> bool:
        """See `Method`."""
        return step >= self.config.freeze_last

    def loss(self, step: int, z: Tensor, targets: Tensor | None) -> Tensor:
        """See `Method`."""
        assert targets is not None
        c, last, own = self.config, self.weights.last, self.memory
        assert isinstance(last, Tensor)
        own.last, own.centre = own.last.to(z), own.centre.to(z)
        with torch.no_grad():
            if step > 0:
                own.last.lerp_(last, 1 - self.momentum(step))
            teacher = unit(targets) @ unit(own.last).T
        student = unit(z) @ unit(last).T
        value = dino(student, teacher, own.centre, c.student_temperature, c.teacher_temperature)
        own.centre = next_centre(own.centre, teacher, c.centre_momentum)
        return value
