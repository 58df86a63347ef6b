"""The camera behind the windscreen: where points appear, and what pixels see of the ground.

World: X to the right, Y down, Z ahead, in metres, the camera at the origin, the road's direction at the
car along Z. The ground lies at Y = height - rise Z² / 2. Pixels: whole numbers are their centres.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.noise import Field

MOST_SEEN = 250.0


@dataclass(frozen=True)
class Camera:
    """A pin-hole camera.

    height: above the ground, in metres.
    focal: focal length in half widths of the image; the image shows a view twice as wide as high, so a
        frame of another shape shows it stretched.
    pitch, yaw, roll: in radians; positive looks down, to the right, and turns clockwise.
    """

    height: float
    focal: float
    pitch: float
    yaw: float
    roll: float

    @cached_property
    def rotation(self) -> NDArray[np.float64]:
        """From the world's axes to the camera's [3, 3]."""
        (cp, cy, cr), (sp, sy, sr) = (f([self.pitch, self.yaw, self.roll]) for f in (np.cos, np.sin))
        yaw = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return roll @ pitch @ yaw

    def scale(self, frame: Frame) -> tuple[float, float]:
        """Pixels across and down for a point one metre aside or below at one metre ahead."""
        return self.focal * frame.width / 2, self.focal * frame.height

    def project(self, frame: Frame, x: Field, y: Field, z: Field) -> tuple[Field, Field]:
        """Where points ahead of the camera appear, across and down, in pixels."""
        across, down, ahead = (a * x + b * y + c * z for a, b, c in self.rotation.tolist())
        per_x, per_y = self.scale(frame)
        return (
            (frame.width - 1) / 2 + per_x * across / ahead,
            (frame.height - 1) / 2 + per_y * down / ahead,
        )

    def horizon(self, frame: Frame, columns: Field) -> Field:
        """The row of the horizon of a flat world at each column."""
        per_x, per_y = self.scale(frame)
        across, down, ahead = self.rotation[:, 1]
        return (frame.height - 1) / 2 - per_y / down * (
            across * (columns - (frame.width - 1) / 2) / per_x + ahead
        )

    def ground(self, frame: Frame, rise: float, columns: Field, rows: Field) -> tuple[Field, Field]:
        """X and Z [rows, columns] of the ground that pixels see first, in metres; NaN where they see none
        within MOST_SEEN."""
        per_x, per_y = self.scale(frame)
        across = ((columns - (frame.width - 1) / 2) / per_x).astype(np.float32)
        down = ((rows - (frame.height - 1) / 2) / per_y).astype(np.float32)[:, None]
        x, y, z = (
            np.float32(row[0]) * across + np.float32(row[1]) * down + np.float32(row[2])
            for row in self.rotation.T
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            reach = 2 * self.height / (y + np.sqrt(y * y + np.float32(2 * rise * self.height) * z * z))
            ahead = reach * z
            ahead[~((ahead > 0) & (ahead < MOST_SEEN))] = np.nan
        return x * reach, ahead


def random_camera(random: Generator) -> Camera:
    """A camera of a car on the road."""
    focal = 1 / np.tan(np.radians(random.uniform(55, 65)) / 2)
    below_top = random.uniform(0.36, 0.46)
    return Camera(
        height=random.uniform(1.3, 1.6),
        focal=float(focal),
        pitch=float(np.arctan((0.5 - below_top) / focal)),
        yaw=float(np.radians(np.clip(random.normal(0, 0.8), -1.6, 1.6))),
        roll=float(np.radians(np.clip(random.normal(0, 0.7), -1.5, 1.5))),
    )
