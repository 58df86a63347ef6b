"""ESPNet (Mehta et al., arXiv 1803.06815): segmentation with spatial pyramids of dilated convolutions."""

import re

import torch
from torch import Tensor, nn

from ptq_vision.preprocess import Preprocess

# The authors' training subtracts the mean of the CamVid images and divides by their standard deviation
# (in units of 0 to 255), and then divides by 255 once more.
PREPROCESS = Preprocess(
    size=(360, 480),
    interpolation="bilinear",
    order="bgr",
    mean=(0.4290, 0.4213, 0.4121),
    std=(71.80, 72.36, 69.62),
)
VOID = 11
_DILATIONS = (2, 4, 8, 16)
_EPSILON = 1e-3
_BRANCHES = len(_DILATIONS) + 1


class NormAct(nn.Sequential):
    """`norm`, `act` (PReLU with one slope a channel)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=_EPSILON)
        self.act = nn.PReLU(channels)


class ConvNormAct(nn.Sequential):
    """`conv`, `norm`, `act`, with a 3x3 kernel."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, 3, stride)
        self.norm = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.act = nn.PReLU(outputs)


class Pyramid(nn.Module):
    """Reduce, convolve at five dilations, and sum hierarchically (section 3.1 of the paper).

    The branches of dilation 2 to 16 each add the sum of the ones before; the plain branch stands
    alone, as wide as is needed to have `outputs` channels in all.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = outputs // _BRANCHES
        self.reduce = _conv(inputs, width, kernel, stride)
        self.plain = _conv(width, outputs - width * len(_DILATIONS), 3)
        self.dilated2 = _conv(width, width, 3, dilation=2)
        self.dilated4 = _conv(width, width, 3, dilation=4)
        self.dilated8 = _conv(width, width, 3, dilation=8)
        self.dilated16 = _conv(width, width, 3, dilation=16)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        sum2 = self.dilated2(reduced)
        sum4 = sum2 + self.dilated4(reduced)
        sum8 = sum4 + self.dilated8(reduced)
        sum16 = sum8 + self.dilated16(reduced)
        return torch.cat([self.plain(reduced), sum2, sum4, sum8, sum16], dim=1)


class ESP(nn.Module):
    """A pyramid behind a 1x1 reduction; the input is added where `adds_input` says so."""

    def __init__(self, inputs: int, outputs: int, adds_input: bool = True) -> None:
        super().__init__()
        self.pyramid = Pyramid(inputs, outputs, kernel=1, stride=1)
        self.norm_act = NormAct(outputs)
        self.adds_input = adds_input

    def forward(self, x: Tensor) -> Tensor:
        y = self.pyramid(x)
        return self.norm_act(x + y if self.adds_input else y)


class StridedESP(nn.Module):
    """A pyramid behind a 3x3 reduction of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(inputs, outputs, kernel=3, stride=2)
        self.norm_act = NormAct(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_act(self.pyramid(x))


class Encoder(nn.Module):
    """Images [n, 3, h, w] to features at a half (19 channels), a quarter (131) and an eighth (256).

    `stem`, `join1`, `down2`, `stage2.*`, `join2`, `down3`, `stage3.*`, `join3`: every join takes the
    features of its resolution, and the first two the image, averaged down, as well.
    """

    def __init__(self, p: int, q: int) -> None:
        super().__init__()
        self.to_half = nn.AvgPool2d(3, stride=2, padding=1)
        self.to_quarter = nn.AvgPool2d(3, stride=2, padding=1)
        self.stem = ConvNormAct(3, 16, stride=2)
        self.join1 = NormAct(16 + 3)
        self.down2 = StridedESP(16 + 3, 64)
        self.stage2 = nn.Sequential(*(ESP(64, 64) for _ in range(p)))
        self.join2 = NormAct(64 + 64 + 3)
        self.down3 = StridedESP(64 + 64 + 3, 128)
        self.stage3 = nn.Sequential(*(ESP(128, 128) for _ in range(q)))
        self.join3 = NormAct(128 + 128)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.to_half(image)
        quarter = self.to_quarter(half)
        at_half = self.join1(torch.cat([self.stem(image), half], dim=1))
        down2 = self.down2(at_half)
        at_quarter = self.join2(torch.cat([self.stage2(down2), down2, quarter], dim=1))
        down3 = self.down3(at_quarter)
        at_eighth = self.join3(torch.cat([down3, self.stage3(down3)], dim=1))
        return at_half, at_quarter, at_eighth


class Decoder(nn.Module):
    """Features of the encoder to logits [n, classes, h, w], doubling the resolution three times."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.score_eighth = _conv(256, classes, 1)
        self.norm_eighth = nn.BatchNorm2d(classes, eps=_EPSILON)
        self.up_eighth = _double(classes)
        self.score_quarter = _conv(131, classes, 1)
        self.join_quarter = NormAct(2 * classes)
        self.mix_quarter = ESP(2 * classes, classes, adds_input=False)
        self.up_quarter = _double(classes)
        self.norm_act_quarter = NormAct(classes)
        self.mix_half = ConvNormAct(classes + 19, classes)
        self.up_half = _double(classes)

    def forward(self, at_half: Tensor, at_quarter: Tensor, at_eighth: Tensor) -> Tensor:
        coarse = self.up_eighth(self.norm_eighth(self.score_eighth(at_eighth)))
        joined = self.join_quarter(torch.cat([self.score_quarter(at_quarter), coarse], dim=1))
        middle = self.norm_act_quarter(self.up_quarter(self.mix_quarter(joined)))
        return self.up_half(self.mix_half(torch.cat([middle, at_half], dim=1)))


class ESPNet(nn.Module):
    """Images [n, 3, h, w] with sides divisible by 8 to logits [n, classes, h, w]: `encoder`, `decoder`."""

    def __init__(self, classes: int = 12, p: int = 2, q: int = 8) -> None:
        """Args:
        classes: output channels; for CamVid 11 classes and void.
        p: ESP modules at a quarter of the resolution.
        q: ESP modules at an eighth.
        """
        super().__init__()
        self.encoder = Encoder(p, q)
        self.decoder = Decoder(classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(*self.encoder(image))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)


def _double(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)


_PLACES = {
    "encoder.level1": "encoder.stem",
    "encoder.b1": "encoder.join1",
    "encoder.level2_0": "encoder.down2",
    "encoder.level2": "encoder.stage2",
    "encoder.b2": "encoder.join2",
    "encoder.level3_0": "encoder.down3",
    "encoder.level3": "encoder.stage3",
    "encoder.b3": "encoder.join3",
    "encoder.classifier.conv": "decoder.score_eighth",
    "level3_C.conv": "decoder.score_quarter",
    "br": "decoder.norm_eighth",
    "conv": "decoder.mix_half",
    "up_l3.0": "decoder.up_eighth",
    "combine_l2_l3.0": "decoder.join_quarter",
    "combine_l2_l3.1": "decoder.mix_quarter",
    "up_l2.0": "decoder.up_quarter",
    "up_l2.1": "decoder.norm_act_quarter",
    "classifier": "decoder.up_half",
}
_BRANCH_NAMES = {
    "c1": "reduce",
    "d1": "plain",
    "d2": "dilated2",
    "d4": "dilated4",
    "d8": "dilated8",
    "d16": "dilated16",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names of the authors' checkpoints turned into ours."""
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    place = max((old for old in _PLACES if name.startswith(f"{old}.")), key=len, default=None)
    if place is None:
        return name
    rest = name[len(place) + 1 :]
    in_esp = re.fullmatch(r"((?:\d+\.)?)(.+)", rest)
    index, rest = in_esp.groups() if in_esp else ("", rest)
    rest = re.sub(r"^(c1|d1|d2|d4|d8|d16)\.conv\.", lambda m: f"pyramid.{_BRANCH_NAMES[m[1]]}.", rest)
    return f"{_PLACES[place]}.{index}{_our_norm(_PLACES[place], rest)}"


def _our_norm(place: str, rest: str) -> str:
    """Inside ESP modules batch norm and PReLU are one module, `norm_act`, however they were named."""
    rest = re.sub(r"^bn\.bn\.", "norm_act.norm.", rest)
    rest = re.sub(r"^bn\.act\.", "norm_act.act.", rest)
    if place.startswith("encoder.down"):
        rest = re.sub(r"^(bn|act)\.", lambda m: f"norm_act.{ {'bn': 'norm', 'act': 'act'}[m[1]] }.", rest)
    return re.sub(r"^bn\.", "norm.", rest)
