"""Road scenes made of nothing but a seed, with the exact place of every lane line."""

from ptq_lane.scenes.scene import Scene as Scene
from ptq_lane.scenes.scene import Scenes as Scenes
