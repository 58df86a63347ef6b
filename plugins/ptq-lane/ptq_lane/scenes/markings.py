"""Paint on the road: lines and arrows."""

import numpy as np
from numpy.random import Generator

from ptq_lane.scenes.ground import Ground, blend, share_within
from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import WHITE, Line, Road


def paint_markings(colour: Field, ground: Ground, road: Road, bright: float, random: Generator) -> None:
    """Lay the road's lines, and in some scenes an arrow, over a colour [3, h, w], in place."""
    worn = 0.5 + 0.6 * ground.texture(0.03, 4, 0.6, random)
    for line in road.lines:
        cover = _line(ground, line) * (1 - line.wear * np.clip(worn + line.wear, 0, 1))
        blend(colour, cover, line.colour, bright)
    shown, z, lane, wear = random.random(4)
    if shown < 0.15:
        first, second = road.lines[0].offset, road.lines[1].offset
        middle = (first + second) / 2 + int(lane * (len(road.lines) - 1)) * (second - first)
        cover = _arrow(ground, middle, 7 + 20 * z) * (1 - 0.6 * wear * np.clip(worn + wear, 0, 1))
        blend(colour, cover, WHITE, bright)


def _line(ground: Ground, line: Line) -> Field:
    """How much of each pixel a line covers."""
    if line.gap:
        apart = (line.gap + line.width) / 2
        cover = share_within(ground.offset, ground.wide, line.offset - apart, line.width)
        cover += share_within(ground.offset, ground.wide, line.offset + apart, line.width)
    else:
        cover = share_within(ground.offset, ground.wide, line.offset, line.width)
    return cover * _dashes(ground, *line.dash) if line.dash else cover


def _dashes(ground: Ground, period: float, length: float, start: float) -> Field:
    """How much of each pixel's depth lies in dashes."""

    def painted_up_to(z: Field) -> Field:
        periods = (z - np.float32(start)) / np.float32(period)
        whole = np.floor(periods)
        begun = np.minimum((periods - whole) * np.float32(period), np.float32(length))
        return whole * np.float32(length) + begun

    half = ground.deep / 2
    return (painted_up_to(ground.z + half) - painted_up_to(ground.z - half)) / ground.deep


def _arrow(ground: Ground, offset: float, z: float) -> Field:
    """How much of each pixel an arrow straight ahead covers: a shaft of 3.5 m and a head of 2 m."""
    shaft = share_within(ground.offset, ground.wide, offset, 0.2) * share_within(
        ground.z, ground.deep, z + 1.75, 3.5
    )
    half = np.clip((np.float32(z + 5.5) - ground.z) * np.float32(0.45 / 2), 0, 0.45)
    head = np.clip((half - np.abs(ground.offset - np.float32(offset))) / ground.wide + 0.5, 0, 1)
    return np.maximum(shaft, head * share_within(ground.z, ground.deep, z + 4.5, 2))
