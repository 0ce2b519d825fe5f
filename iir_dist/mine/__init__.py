"""Mining by the stages themselves: hard negatives for fine-tuning (draw, embed, search, choose), neighbours for insclr.

A round is a small retrieval experiment on the training images, so it is made of the same stages: the drawn images are
copied into an images artifact, `embed` embeds them, `search` ranks them for every query, exactly or, where they are
many, by an index. All of them go on after an interruption; the last, the table of tuples, is written when the others
are done, and then these are deleted. Copying costs reading and writing the drawn images once, beside which embedding
all images of the set to use a part of them would cost most. For neighbours all images are embedded and searched for;
they are copied only where they are of several artifacts, whose ids would be the same.

Trainings are given `mine` and `neighbours` by their caller, because stages do not import each other.
"""

from iir_dist.mine.nearest import neighbours
from iir_dist.mine.tuples import mine

__all__ = ["mine", "neighbours"]
