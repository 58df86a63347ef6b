"""Labels, frames, checkpoints and artifacts of ptq-lane."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

import ptq_lane
from fuzz_targets.core import mend_artifact
from fuzz_targets.target import Target
from fuzz_targets.vision import write_pictures
from ptq_lane import detectors
from ptq_lane.frames import Frames, read_frames
from ptq_lane.labels import read_labels
from ptq_lane.lanes import Frame
from ptqcore import artifact, write_tensors

SIZE = Frame(1280, 720)


def _frames() -> Frames:
    names = [f"clips/{number}/20.jpg" for number in range(2)]
    return Frames(names, SIZE, lambda _: np.zeros((SIZE.height, SIZE.width, 3), np.uint8))


def write_lines(folder: Path) -> None:
    for number in range(2):
        (folder / f"clips/{number}").mkdir(parents=True)
        (folder / f"clips/{number}/20.lines.txt").write_text(
            "100.5 710 200 600\n700 700 650.25 500 640 450\n"
        )
    (folder / "list/test_split").mkdir(parents=True)
    (folder / "list/test_split/test0_normal.txt").write_text("clips/0/20.jpg\n/clips/1/20.jpg\n")


def read_lines(folder: Path) -> None:
    read_labels(str(folder), _frames(), "task.labels")


def _labels() -> str:
    lanes = [[-2, 632, 600.5, 580], [900, 910, 920, -2]]
    entry = {"lanes": lanes, "h_samples": [240, 400, 560, 710]}
    return "".join(json.dumps(entry | {"raw_file": f"clips/{number}/20.jpg"}) + "\n" for number in range(2))


def write_tusimple(folder: Path) -> None:
    (folder / "labels.lines.json").write_text(_labels())


def write_tusimple_gz(folder: Path) -> None:
    (folder / "labels.json.gz").write_bytes(gzip.compress(_labels().encode()))


def read_tusimple(folder: Path) -> None:
    (file,) = folder.iterdir()
    read_labels(str(file), _frames(), "task.labels")


def read_pictures(folder: Path) -> None:
    frames = read_frames(str(folder), "task.images")
    for number in range(len(frames)):
        frames.read(number)


def write_video(folder: Path) -> None:
    import cv2

    writer = cv2.VideoWriter(str(folder / "video.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 16))
    for number in range(3):
        writer.write(np.full((16, 32, 3), 80 * number, np.uint8))
    writer.release()


def read_video(folder: Path) -> None:
    frames = read_frames(str(folder / "video.avi"), "task.images")
    frames.read(len(frames) - 1)


@cache
def _lstr() -> dict[str, torch.Tensor]:
    """A checkpoint with the authors' name for one tensor in a hundred, and that of the classes."""
    state = detectors.find("lstr").structure().state_dict()
    kept = dict(list(state.items())[:4])
    joined = {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.zeros(96, 32)}
    heads = {"class_embed.weight": torch.zeros(3, 32), "specific_embed.layers.2.weight": torch.zeros(4, 32)}
    return kept | joined | heads


def write_lstr(folder: Path) -> None:
    torch.save({"state_dict": _lstr()}, folder / "lstr.pth")


def read_lstr(folder: Path) -> None:
    """The seed is incomplete on purpose: what is read is refused at its end."""
    detectors.find("lstr", "culane").load(folder / "lstr.pth")


def write_detector(folder: Path) -> None:
    """An artifact without quantized layers: what is particular of it is what describes the detector."""
    (folder / "assets").mkdir()
    preprocess = detectors.find("curve").preprocess.model_dump(mode="json")
    described = {"family": "curve", "variant": None, "model": None, "splits": {}, "preprocess": preprocess}
    described["frame"] = {"width": 160, "height": 96}
    (folder / "assets/detector.json").write_text(json.dumps(described))
    artifact.save(detectors.find("curve").structure(), folder, "lane", "lanes", "0")


def read_detector(folder: Path) -> None:
    ptq_lane.load(folder)


def write_weights(folder: Path) -> None:
    write_tensors(folder / "row-anchor.safetensors", detectors.find("curve").structure().state_dict())


def read_weights(folder: Path) -> None:
    detectors.find("curve").load(folder / "row-anchor.safetensors")


TARGETS = (
    Target("culane-labels", write_lines, read_lines),
    Target("tusimple-labels", write_tusimple, read_tusimple),
    Target("tusimple-labels-gz", write_tusimple_gz, read_tusimple),
    Target("frames", write_pictures, read_pictures),
    Target("video", write_video, read_video),
    Target("lane-weights", write_weights, read_weights),
    Target("lstr-checkpoint", write_lstr, read_lstr, whole=False),
    Target("lane-detector", write_detector, read_detector, mend_artifact),
)
