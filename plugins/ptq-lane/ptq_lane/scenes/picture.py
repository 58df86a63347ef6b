"""The picture of a scene: backdrop, ground, what stands on it, lights and the camera's electronics."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.backdrop import paint_backdrop, sky_colours
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.ground import ground_seen, paint_ground
from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.roadside import random_roadside
from ptq_lane.scenes.sensor import recorded
from ptq_lane.scenes.stage import Glow, Stage, add_glow
from ptq_lane.scenes.vehicles import paint_vehicle, random_vehicles
from ptq_lane.scenes.weather import Weather

_FINER = 2


def picture(
    frame: Frame, camera: Camera, road: Road, weather: Weather, random: Generator
) -> NDArray[np.uint8]:
    """The picture [height, width, 3], red, green, blue."""
    fine = Frame(_FINER * frame.width, _FINER * frame.height)
    high, low = sky_colours(weather, random)
    canvas = paint_backdrop(fine, camera, weather, high, low, random)
    _lay_ground(canvas, fine, camera, road, weather, low, random)
    stage = Stage(np.asarray(cv2.merge(list(canvas)), np.float32), fine, camera, road, weather, low)
    _fill_stage(stage, random)
    size = (frame.width, frame.height)
    image = np.asarray(cv2.resize(stage.image, size, interpolation=cv2.INTER_AREA), np.float32)
    for glow in stage.glows:
        add_glow(image, glow)
    if weather.glare:
        _dazzle(image, camera, frame, weather, random)
    return recorded(image, weather, random)


def _lay_ground(
    canvas: Field, frame: Frame, camera: Camera, road: Road, weather: Weather, far: Field, random: Generator
) -> None:
    """Paint the ground over a backdrop [3, h, w] through the haze, mirroring the sky where wet, in place."""
    ground = ground_seen(frame, camera, road)
    colours = paint_ground(ground, road, weather, random)
    veil = np.maximum(
        1 - np.exp(np.float32(-weather.haze) * ground.z),
        np.float32(weather.wet) * np.clip(ground.z / 30, 0, 1),
    )
    for channel, colour, air in zip(canvas[:, ground.top :], colours, far, strict=True):
        np.copyto(channel, colour + veil * (air - colour), where=ground.seen)


def _fill_stage(stage: Stage, random: Generator) -> None:
    """Paint what stands on the ground, far things first."""
    things = random_roadside(random, stage.road)
    for vehicle in random_vehicles(random, stage.road, stage.weather.vehicles):
        things.append((vehicle.z, lambda stage, vehicle=vehicle: paint_vehicle(stage, vehicle)))
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint(stage)


def _dazzle(
    image: NDArray[np.float32], camera: Camera, frame: Frame, weather: Weather, random: Generator
) -> None:
    """Let a low sun or a lamp ahead blind the camera, in place."""
    x, above, warm = random.uniform(0.2, 0.8), random.uniform(0.02, 0.25), random.uniform(0.6, 1)
    light = np.array([1, 0.55 + 0.45 * warm, 0.2 + 0.75 * warm]) * weather.glare
    horizon = float(camera.horizon(frame, np.array([x * frame.width]))[0]) / frame.height
    image *= np.float32(1 - 0.35 * weather.glare)
    for reach, strength in ((0.035, 1.6), (0.12, 0.6), (0.6, 0.45)):
        red, green, blue = (float(part) for part in strength * light)
        add_glow(image, Glow(x * frame.width / frame.height, horizon - above, reach, (red, green, blue)))
    columns = np.abs(np.arange(frame.width, dtype=np.float32) / frame.width - np.float32(x))
    rows = np.arange(frame.height, dtype=np.float32) / frame.height - np.float32(horizon)
    streak = np.exp(-columns / np.float32(0.035)) * np.clip(rows[:, None] * 20, 0, 1)
    image += (streak * np.exp(-3 * np.clip(rows[:, None], 0, 1)))[..., None] * (0.35 * light).astype(
        np.float32
    )
