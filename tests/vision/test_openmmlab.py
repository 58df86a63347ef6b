"""What of the OpenMMLab part works without OpenMMLab: names, descriptions, checkpoints, nms, sentences."""

import collections
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from ptq_vision.openmmlab import checkpoints, loading, stand_in
from ptq_vision.openmmlab.description import Description, describe, for_inference, parse
from ptq_vision.openmmlab.preprocessing import Preprocessing
from ptqcore import ModelError

# Names and sentences


@pytest.mark.parametrize("model", ["my/config.py", "mmseg:pidnet-s", "mmdet:rtmdet_tiny_8xb32-300e_coco"])
def test_configs_are_recognised(model):
    assert loading.is_config(model)


@pytest.mark.parametrize(
    "model", ["resnet18", "timm:resnet18", "package.module:factory", "mmcls:x", "a.pyc"]
)
def test_other_models_are_no_configs(model):
    assert not loading.is_config(model)


def test_missing_packages_are_named_with_the_lines_that_install_them(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "mmdet" else object())
    with pytest.raises(
        ModelError, match=r"need mmdet, not installed here: pip install .*--no-deps mmengine==0.10.7"
    ):
        loading.load("mmdet:rtmdet_tiny_8xb32-300e_coco")


# Descriptions


def test_a_description_survives_its_text_with_tuples_and_lists_apart():
    description = Description(
        "mmdet", {"type": "X", "sizes": [(1, 2), [3.5, None]]}, [{"scale": (640, 480)}]
    )
    assert parse(describe(description)) == description


def test_a_description_that_json_would_change_is_refused():
    with pytest.raises(ModelError, match="keys that are not strings"):
        describe(Description("mmseg", {"levels": {1: "a"}}, []))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"scope": "mmseg"}',
        '{"unknown": 1}',
        '{"scope": "os", "model": {}, "pipeline": []}',
    ],
)
def test_a_text_that_is_no_description_is_refused(text):
    with pytest.raises(ModelError, match="not the description of a model"):
        parse(text)


@pytest.mark.parametrize("name", ["os.system", "mmengine.fileio.load", "mmcv.imread", "eval('x')", 3])
def test_a_stored_type_that_is_no_registered_name_is_refused(name, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="which no registry knows"):
        loading.build(Description("mmseg", {"type": "EncoderDecoder", "backbone": [{"type": name}]}, []))


def test_what_only_training_needs_is_left_out():
    section = {
        "pretrained": "open-mmlab://x",
        "train_cfg": {"a": 1},
        "auxiliary_head": [{"type": "FCNHead"}],
        "backbone": {
            "type": "mmdet.models.CSPNeXt",
            "init_cfg": {"type": "Pretrained", "checkpoint": "https://x"},
        },
        "head": {"norm_cfg": {"type": "SyncBN", "requires_grad": True}, "init_cfg": {"type": "Normal"}},
    }
    assert for_inference(section) == {
        "train_cfg": None,
        "auxiliary_head": None,
        "backbone": {"type": "mmdet.CSPNeXt"},
        "head": {"norm_cfg": {"type": "BN", "requires_grad": True}, "init_cfg": {"type": "Normal"}},
    }


# Checkpoints


def checkpoint(file, state, **beside):
    torch.save({"state_dict": state, "meta": {"epoch": 3}, **beside}, file)
    return str(file)


def test_auxiliary_heads_of_a_checkpoint_are_left_out(tmp_path):
    weight = torch.rand(2, 3)
    state = {"module.weight": weight, "module.auxiliary_head.weight": torch.ones(4)}
    found = checkpoints.read(checkpoint(tmp_path / "c.pth", state))
    assert found.keys() == {"weight"}
    assert torch.equal(found["weight"], weight)


def test_histories_of_training_in_a_checkpoint_do_not_matter(tmp_path):
    history = pytest.importorskip("mmengine.logging").HistoryBuffer
    state = nn.Linear(3, 2).state_dict()
    scalars = collections.OrderedDict(loss=history([1.0, 2.0], [1, 1]))
    beside = {"message_hub": {"log_scalars": scalars, "lr": np.float64(0.1)}}
    assert checkpoints.read(checkpoint(tmp_path / "c.pth", state, **beside)).keys() == state.keys()


class Harmful:
    def __reduce__(self):
        return print, ("run while loading",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capfd):
    file = checkpoint(tmp_path / "c.pth", nn.Linear(3, 2).state_dict(), meta=Harmful())
    with pytest.raises(ModelError, match=r"task\.checkpoint .*c\.pth' cannot be read"):
        checkpoints.read(file)
    assert capfd.readouterr().out == ""


# Preprocessing


def test_preprocessing_is_read_from_a_config():
    given = {"mean": [1, 2, 3], "std": [4, 5, 6], "bgr_to_rgb": True, "pad_size_divisor": 32}
    pipeline = [
        {"type": "Resize", "scale": (640, 480), "keep_ratio": True},
        {"type": "Pad", "size": (640, 512), "pad_val": {"img": (114, 114, 114)}},
    ]
    found = Preprocessing.of(Description("mmdet", {"data_preprocessor": given}, pipeline))
    assert found == Preprocessing(
        size=(480, 640), keep_ratio=True, padded=(512, 640), pixel=114.0,
        mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), divisor=32,
    )  # fmt: skip


def test_without_resizing_an_image_is_normalized_and_padded_to_a_multiple():
    prepare = Preprocessing(rgb=False, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0), divisor=4, value=7.0)
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    prepared = prepare(image)
    expected = torch.full((1, 3, 4, 4), 7.0)
    for channel in range(3):
        expected[0, channel, :2, :3] = (
            torch.from_numpy(image[..., 2 - channel].copy()).float() - (channel + 1)
        ) / 2
    assert torch.equal(prepared.image, expected)
    assert (prepared.original, prepared.resized, prepared.scale) == ((2, 3), (2, 3), (1.0, 1.0))


# The stand-in


def reference_nms(boxes, scores, threshold, offset):
    """Greedy, by explicit loops over pairs."""

    def area(box):
        return max(box[2] - box[0] + offset, 0) * max(box[3] - box[1] + offset, 0)

    kept = []
    for index in sorted(range(len(boxes)), key=lambda index: -scores[index]):
        for other in kept:
            a, b = boxes[index], boxes[other]
            shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
            if shared / (area(a) + area(b) - shared) > threshold:
                break
        else:
            kept.append(index)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms_is_greedy(offset, threshold):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 1 + torch.rand(60, 2, generator=generator) * 20], 1)
    scores = torch.rand(60, generator=generator)
    expected = reference_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert stand_in.nms(boxes, scores, iou_threshold=threshold, offset=offset).tolist() == expected


def test_nms_of_nothing_is_nothing():
    assert stand_in.nms(torch.empty(0, 4), torch.empty(0), iou_threshold=0.5, offset=0).tolist() == []


def test_the_stand_in_is_a_module_with_a_spec_and_refuses_other_operations(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, stand_in.NAME, raising=False)
    monkeypatch.setattr(stand_in, "find_spec", lambda name: None)
    stand_in.install()
    stand_in.install()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert find_spec(stand_in.NAME) is sys.modules[stand_in.NAME].__spec__
    with pytest.raises(
        ModelError, match="mmcv's compiled operation 'roi_align_forward', which mmcv-lite lacks"
    ):
        sys.modules[stand_in.NAME].roi_align_forward(1, b=2)
    monkeypatch.delitem(sys.modules, stand_in.NAME)


def test_real_operations_are_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, stand_in.NAME, raising=False)
    monkeypatch.setattr(stand_in, "find_spec", lambda name: object())
    stand_in.install()
    assert stand_in.NAME not in sys.modules


def test_a_description_is_readable_json():
    text = describe(Description("mmseg", {"type": "EncoderDecoder"}, [{"scale": (2, 1)}]))
    assert json.loads(text) == {
        "scope": "mmseg",
        "model": {"type": "EncoderDecoder"},
        "pipeline": [{"scale": {"tuple": [2, 1]}}],
    }
