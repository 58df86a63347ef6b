"""Light, weather and the camera's electronics."""

from dataclasses import dataclass

from numpy.random import Generator


@dataclass(frozen=True)
class Weather:
    """What falls on the scene and what the camera makes of it.

    light: of the sky, 1 by day.
    tint: of that light, red, green, blue.
    night: whether the car's own headlights light the road.
    shade: how much light shadows take, 0 to 1.
    clouds: 0 (clear) to 1 (overcast).
    wet: how much of the sky the road mirrors, 0 to 1.
    haze: density, in 1 / metre.
    glare: how strongly a light ahead blinds the camera.
    vehicles: how many at most.
    blur: of the lens, in heights of the image.
    noise: of the sensor, of 1.
    quality: of the JPEG, 1 to 100.
    """

    light: float
    tint: tuple[float, float, float]
    night: bool
    shade: float
    clouds: float
    wet: float
    haze: float
    glare: float
    vehicles: int
    blur: float
    noise: float
    quality: int


def random_weather(random: Generator, category: str) -> Weather:
    """The weather of a scene of a category."""
    night, shadowed, dazzled = category == "night", category == "shadow", category == "dazzle"
    clouds, mirror, rain = random.random(3)
    rainy = rain < 0.15 and not (night or shadowed or dazzled)
    shade = random.uniform(0.45, 0.75) if shadowed else random.uniform(0, 0.35)
    warmth = random.normal(0, 0.04)
    return Weather(
        light=random.uniform(0.06, 0.22) if night else random.uniform(0.75, 1.15) + 0.1 * shadowed,
        tint=(1 + warmth, 1.0, 1 - warmth),
        night=night,
        shade=0.0 if night or rainy else shade,
        clouds=1.0 if rainy else 0.6 * clouds if shadowed else clouds,
        wet=mirror * (0.5 if rainy else 0.15 if night else 0.05),
        haze=random.uniform(1 / 150, 1 / 60) if rainy else random.uniform(1 / 2000, 1 / 250),
        glare=random.uniform(0.5, 1.0) if dazzled else 0.0,
        vehicles=int(random.integers(4, 11) if category == "crowd" else random.integers(0, 4)),
        blur=random.uniform(0.002, 0.007) if rainy else random.uniform(0.0008, 0.004),
        noise=random.uniform(0.015, 0.045) if night else random.uniform(0.003, 0.02),
        quality=int(random.integers(40, 96)),
    )
