"""The style of three sets of texts beside each other: the author's, the base model's and the tuned model's."""

from collections.abc import Sequence

from persona.style.results import Comparison


def compare(
    author: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str] | None = None,
    *,
    seed: int,
    reference: Sequence[Sequence[str]] = (),
    repeats: int = 200,
) -> Comparison:
    """How far from `base` to `author` the texts of `tuned` have gone; without `tuned`, only the two anchors.

    `reference` are the texts of other authors, one sequence each, for whoever has them: what is usual is then judged
    by them too.
    """
    raise NotImplementedError
