"""How far rounding moves the logits of a row in a batch, and what keeps it out of the replies."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

WIDTH = 8  # rows of each pass in 16 bits, filled up: --batch-size is 8 unless somebody sets it
# A difference may be larger than the largest that was seen, and a gap closes from both sides: 2 x 2
SAFETY = 4
LEAST = 1e-3  # in float32, where a few passes may show no difference at all; it concerns one choice in a thousand
# In bfloat16 on the embedded model 0.1 concerns 3 % of the greedy choices and 9 % at temperature 0.7, 0.15 10 and 13 %
MOST = 0.1


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Rounding:
    """The measured noise of a model on a device, and the way of decoding that leaves replies equal in any batch."""

    difference: float | None
    """Largest difference of a logit between a row in a batch and the same row alone; None if it was not measured."""
    margin: float
    """Choices whose logits are nearer to each other are made again from a pass over that reply alone; 0: none is."""
    rows: int | None
    """Rows of each pass, filled up if there are fewer; 1 is one reply at a time, None is as many as there are."""

    def __str__(self) -> str:
        if self.rows == 1:
            return "one at a time"
        return "in batches" if self.rows is None else f"in passes of {self.rows} rows"


ONE_BY_ONE = Rounding(None, 0.0, 1)
LOOSE = Rounding(None, 0.0, None)  # nothing is chosen again, so the replies are those of one batch


def with_margin(difference: float) -> Rounding:
    """Batches of any size whose rows differ by up to `difference` from a row alone, or one reply at a time."""
    margin = max(SAFETY * difference, LEAST)
    return Rounding(difference, margin, None) if margin <= MOST else Rounding(difference, 0.0, 1)
