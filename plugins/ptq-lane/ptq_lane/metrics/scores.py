"""All figures of a run over images, for the report."""

import numpy as np

from ptq_lane.labels import Label
from ptq_lane.lanes import Frame, Lanes, Numbers
from ptq_lane.metrics.culane import CROSS, THRESHOLDS, TOTAL, Band, Counts, by_category, draw, match
from ptq_lane.metrics.ego import ego_pair
from ptq_lane.metrics.tusimple import Rates, image_rates, mean_rates

_EDGE = 0.5
_UNKNOWN = "other"


class Scores:
    """Takes the lanes of one image after the other and gives the figures over all of them."""

    def __init__(self, frame: Frame) -> None:
        """Args:
        frame: the images that all lanes are given in.
        """
        self._frame = frame
        self._counts: list[tuple[str | None, dict[float, Counts]]] = []
        self._ego = Counts()
        self._agreement = Counts()
        self._rates: list[Rates] = []

    def add(self, found: Lanes, label: Label | None, reference: Lanes, category: str | None = None) -> None:
        """Judge one image.

        Args:
            found: the lanes that the model finds.
            label: those that should be found; None if nobody knows.
            reference: those that the model finds in full precision.
            category: of the image, as CULane has them.
        """
        points = _points(found)
        bands = draw(points, self._frame)
        known = bands if reference is found else draw(_points(reference), self._frame)
        self._agreement += match(_visible(bands), _visible(known), [_EDGE])[_EDGE]
        if label is None:
            return
        labelled = draw(label.lanes, self._frame)
        self._counts.append((category, match(bands, labelled, THRESHOLDS)))
        ego = [bands[place] for place in ego_pair(points, self._frame)]
        labelled_ego = [labelled[place] for place in ego_pair(label.lanes, self._frame)]
        self._ego += match(ego, labelled_ego, [_EDGE])[_EDGE]
        if label.x is not None and label.rows is not None:
            x = _inside(found.at(label.rows).x, self._frame)
            self._rates.append(image_rates(x, label.x, label.rows))

    def result(self) -> dict[str, float]:
        """The figures by name, in percent but for `tusimple_fp`, `tusimple_fn` and `fp/cross`.

        f1@0.3, f1@0.5, f1@0.75: F1 of CULane at these intersections over union.
        ego_f1@0.5: the same of the two lines that the car drives between alone.
        agreement_f1@0.5: the same against the lanes that the model finds in full precision.
        tusimple_accuracy, tusimple_fp, tusimple_fn: the rates of TuSimple.
        f1@0.5/night and so on: F1 of the images of each category, `other` for those of none; of crossroads,
            which have no labelled lanes, `fp/cross`, the number of lanes found.

        Figures that need labels are left out where there are none.
        """
        figures = {f"agreement_f1@{_EDGE}": 100 * self._agreement.f1}
        if self._counts:
            for threshold in THRESHOLDS:
                total = sum((counts[threshold] for _, counts in self._counts), Counts())
                figures[f"f1@{threshold}"] = 100 * total.f1
            figures[f"ego_f1@{_EDGE}"] = 100 * self._ego.f1
        if self._rates:
            rates = mean_rates(self._rates)
            figures |= {
                "tusimple_accuracy": 100 * rates.accuracy,
                "tusimple_fp": rates.fp,
                "tusimple_fn": rates.fn,
            }
        return figures | self._by_category()

    def categories(self) -> dict[str, Counts]:
        """The counts of the labelled images of each category, at 0.5, and their total; empty if no category
        is known."""
        if all(category is None for category, _ in self._counts):
            return {}
        return by_category((category or _UNKNOWN, counts[_EDGE]) for category, counts in self._counts)

    def _by_category(self) -> dict[str, float]:
        categories = self.categories()
        categories.pop(TOTAL, None)
        cross = categories.pop(CROSS, None)
        figures = {f"f1@{_EDGE}/{name}": 100 * counts.f1 for name, counts in categories.items()}
        return figures if cross is None else figures | {f"fp/{CROSS}": cross.fp}


def _points(lanes: Lanes) -> list[Numbers]:
    """The points of each lane that has any."""
    return [points for points in lanes.points() if len(points)]


def _visible(bands: list[Band]) -> list[Band]:
    """The lanes of which something lies in the image; others agree not even with themselves."""
    return [band for band in bands if band.pixels.any()]


def _inside(x: Numbers, frame: Frame) -> Numbers:
    """The lanes without the points beside the image, as TuSimple has them, and without empty ones."""
    x = np.where((x >= 0) & (x < frame.width), x, np.nan)
    return x[~np.isnan(x).all(axis=1)]
