"""From two paths to an `Evaluation`: find, pair, compare image by image, average, warn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from wsitk.errors import UsageError
from wsitk.evaluation.compare import ImageScores, compare
from wsitk.evaluation.figures import Figure, Vocabulary, figures, vocabulary
from wsitk.evaluation.groups import facts_of, read_table, training_names
from wsitk.evaluation.label_files import LabelReader
from wsitk.evaluation.labels import Outlines
from wsitk.evaluation.pairing import Pair, find_items, find_pictures, pair_items
from wsitk.evaluation.pitfalls import Warned, warnings_of
from wsitk.evaluation.settings import Options

if TYPE_CHECKING:
    from wsitk.evaluation.uncertainty import Judge, Uncertainty

__all__ = ["Evaluation", "evaluate"]


@final
@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes
    ----------
    options : Options
    images : tuple of ImageScores
        In the order of their names.
    figures : tuple of Figure
        The protocol's own first.
    vocabulary : Vocabulary
    warnings : tuple of Warned
    pairs : tuple of Pair
        Where each image's truth and prediction lie.
    truth_said, predicted_said : str
        What was read on each side.
    extra : tuple of str
        Predictions without truth, which were left aside.
    uncertainty : Uncertainty or None
        What the predictions' own doubt is worth, where that was asked.
    """

    options: Options
    images: tuple[ImageScores, ...]
    figures: tuple[Figure, ...]
    vocabulary: Vocabulary
    warnings: tuple[Warned, ...]
    pairs: tuple[Pair, ...]
    truth_said: str
    predicted_said: str
    extra: tuple[str, ...] = ()
    uncertainty: Uncertainty | None = None

    def figure(self, key: str) -> Figure:
        """Return a figure by its key, such as ``bpq@images``. Raises UsageError (WSI833) if there is none."""
        for figure in self.figures:
            if figure.key == key:
                return figure
        known = ", ".join(f.key for f in self.figures)
        raise UsageError("WSI833", f"there is no figure {key!r}; there are {known}")


def evaluate(
    predicted: str | Path,
    truth: str | Path,
    options: Options | None = None,
    *,
    on_image: Callable[[str, int], None] = lambda name, total: None,
) -> Evaluation:
    """Compare the predictions in one place with the truth in another.

    `on_image` is told each image's name, and how many there are, before it is read. Images are held one at a time.
    Raises UsageError and SourceError with the codes WSI820 to WSI839, of uncertainty WSI843 to WSI845.
    """
    options = options or Options()
    judge = _judge(options)
    reader = LabelReader(semantic=options.task == "segmentation", classes=options.classes)
    points = options.task == "detection"
    truth_side = find_items(Path(truth), reader, points=points)
    predicted_side = find_items(Path(predicted), reader, points=points)
    pairs, extra = pair_items(truth_side, predicted_side, allow_extra=options.allow_extra)
    pairs = _with_facts(sorted(pairs, key=lambda p: p.name), options)
    images = []
    for pair in pairs:
        on_image(pair.name, len(pairs))
        images.append(_scores(pair, options, judge))
    words = vocabulary(images)
    found = figures(images, options, words)
    training = training_names(options.train) if options.train else []
    return Evaluation(
        options,
        tuple(images),
        tuple(found),
        words,
        tuple(warnings_of(images, found, options, words, training)),
        tuple(pairs),
        truth_side.said,
        predicted_side.said,
        tuple(extra),
        judge.result() if judge else None,
    )


def _judge(options: Options) -> Judge | None:
    """Return who judges the doubt, if that is wanted. Raises UsageError (WSI844) for another task than nuclei."""
    if not options.uncertainty:
        return None
    if options.task != "nuclei":
        raise UsageError(
            "WSI844", f"--uncertainty judges objects and their pixels; take --task nuclei, not {options.task}"
        )
    from wsitk.evaluation.uncertainty import Judge

    return Judge(options)


def _with_facts(pairs: Sequence[Pair], options: Options) -> list[Pair]:
    """Return the pairs with the slide, patient, tissue and picture of each."""
    table = read_table(options.table) if options.table else {}
    slides = all(p.truth.path.name.endswith((".parquet", ".geojson", ".geojson.gz")) for p in pairs)
    facts = facts_of(
        [p.name for p in pairs],
        table,
        options.group,
        tissues={p.name: p.truth.tissue for p in pairs},
        whole_slides=slides,
    )
    pictures = find_pictures(options.images) if options.images else {}
    return [
        Pair(
            p.name,
            replace(p.truth, picture=pictures.get(p.name, p.truth.picture)),
            p.predicted,
            facts[p.name],
        )
        for p in pairs
    ]


def _scores(pair: Pair, options: Options, judge: Judge | None) -> ImageScores:
    truth = pair.truth.read()
    predicted = pair.predicted.read() if pair.predicted else None
    if judge is not None:
        judge.add(pair, truth, predicted)
    if options.task != "detection":
        for side in (truth, predicted):
            if isinstance(side, Outlines) and not side.has_areas:
                raise UsageError(
                    "WSI830", f"{side.source}: points have no area; take --task detection, or give polygons"
                )
    return compare(pair.name, truth, predicted, options, pair.facts)
