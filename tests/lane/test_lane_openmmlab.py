"""Configs of OpenMMLab; what needs the libraries is skipped where these are not installed, as in CI."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from toy_lanes import write_pictures

import ptq_lane
from ptq_lane import Adapter, Lanes, detectors
from ptq_lane.openmmlab import loading
from ptq_lane.openmmlab.description import Description, for_inference, types
from ptqcore import ModelError

FILE = Path("artifact/detector.json")
MODEL = {"type": "EncoderDecoder", "backbone": {"type": "STDCNet", "sizes": (1, [2, (3,)])}, "x": None}

needs_mmseg = pytest.mark.skipif(find_spec("mmseg") is None, reason="mmseg is not installed")
needs_mmdet = pytest.mark.skipif(find_spec("mmdet") is None, reason="mmdet is not installed")

# Without the libraries


@pytest.mark.parametrize("model", ["my/lanes.py", "mmseg:pidnet-s", "mmdet:rtmdet_tiny_8xb32-300e_coco"])
def test_configs_are_recognised(model):
    assert loading.is_config(model)


@pytest.mark.parametrize("model", ["package.module:factory", "mmcls:x", "lanes.pyc"])
def test_other_models_are_no_configs(model):
    assert not loading.is_config(model)


def test_missing_packages_are_named_with_the_line_that_installs_them(ptq, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "mmseg" else object())
    sets = ("--set", "task.family=segmentation", "--set", "task.model=mmseg:pidnet-s")
    code, _, err = ptq("quantize", "--plugin", "lane", "--output", tmp_path / "run", *sets)
    assert code == 2
    sentence = "configs of OpenMMLab need mmseg, not installed here: pip install --no-deps mmengine==0.10.7"
    assert sentence in " ".join(err.split())


def test_a_description_survives_json_with_tuples_and_lists_apart():
    description = Description("mmseg", MODEL)
    assert Description.from_json(json.loads(json.dumps(description.to_json())), "f") == description


def test_a_description_that_json_would_change_is_refused():
    with pytest.raises(ModelError, match="keys that are not strings"):
        Description("mmseg", {"levels": {1: "a"}}).to_json()


@pytest.mark.parametrize("described", [{}, {"scope": "os", "model": {}}, {"scope": "mmseg", "model": []}])
def test_what_describes_no_model_is_refused(described):
    saved = {"family": "segmentation", "variant": None, "model": described}
    with pytest.raises(ModelError, match=r"detector.json describes no OpenMMLab model"):
        detectors.find_saved(saved, FILE)


@pytest.mark.parametrize("model", ["mmseg:pidnet-s", "stranger.py", "mmdet:stranger.py"])
def test_an_artifact_names_no_config_to_run(model):
    with pytest.raises(ModelError, match="which nobody has imported"):
        detectors.find_saved({"family": "segmentation", "model": model}, FILE)


def test_what_stands_around_the_network_or_reads_other_files_is_left_out():
    section = {
        "type": "mmseg.models.segmentors.EncoderDecoder",
        "pretrained": "open-mmlab://x",
        "data_preprocessor": {"type": "SegDataPreProcessor"},
        "test_cfg": {"nms": {"type": "nms"}},
        "auxiliary_head": [{"type": "FCNHead"}],
        "backbone": {"type": "TIMMBackbone", "checkpoint_path": "/etc/x"},
        "neck": {"init_cfg": {"type": "Pretrained", "checkpoint": "https://x"}},
        "decode_head": {"norm_cfg": {"type": "SyncBN"}, "act_cfg": {"type": torch.nn.ReLU}},
    }
    assert for_inference(section) == {
        "type": "mmseg.EncoderDecoder",
        "data_preprocessor": None,
        "test_cfg": None,
        "auxiliary_head": None,
        "backbone": {"type": "TIMMBackbone"},
        "neck": {},
        "decode_head": {"norm_cfg": {"type": "BN"}, "act_cfg": {"type": "ReLU"}},
    }


def test_all_classes_of_a_model_are_found():
    assert types(MODEL | {"heads": [({"type": "A"},), {"deep": {"type": "B"}}]}) == {
        "EncoderDecoder",
        "STDCNet",
        "A",
        "B",
    }


@pytest.mark.parametrize("hostile", [{"type": 3}, {"type": "BN", "_scope_": "stranger"}])
def test_a_type_that_is_no_name_and_another_registry_are_refused(hostile):
    with pytest.raises(ModelError, match="or a key '_scope_'"):
        types({"type": "EncoderDecoder", "backbone": [hostile]})


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_KEYS = st.sampled_from(["type", "init_cfg", "tuple", "_scope_", "pretrained", "x"])
_SECTIONS = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, _SECTIONS, max_size=4))
def test_any_stored_model_is_read_or_refused_in_a_sentence(model):
    saved = {"family": "segmentation", "model": {"scope": "mmseg", "model": model}}
    try:
        kept = detectors.find_saved(saved, FILE).model["model"]
        names = types(Description.from_json({"scope": "mmseg", "model": kept}, "f").model)
    except ModelError:
        return
    assert all(isinstance(name, str) and name for name in names)
    assert "pretrained" not in json.dumps(kept)


# With mmseg

CONFIG = """
default_scope = "mmseg"
norm = dict(type="SyncBN", requires_grad=True)
data_preprocessor = dict(
    type="SegDataPreProcessor", mean=[127.5, 102.0, 51.0], std=[51.0, 51.0, 102.0], bgr_to_rgb=True
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    pretrained="https://nowhere/x.pth",
    backbone=dict(
        type="BiSeNetV2", detail_channels=(8, 8, 16), semantic_channels=(4, 8, 8, 16), bga_channels=16,
        norm_cfg=norm,
    ),
    decode_head=dict(
        type="FCNHead", in_channels=16, in_index=0, channels=16, num_convs=1, concat_input=False,
        num_classes=5, norm_cfg=norm, align_corners=False,
    ),
    auxiliary_head=dict(
        type="FCNHead", in_channels=8, in_index=1, channels=8, num_convs=1, num_classes=5, norm_cfg=norm
    ),
)
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(128, 64), keep_ratio=False)]
"""


@pytest.fixture
def lane_config(tmp_path):
    """A lane network of mmseg, and a checkpoint as mmengine writes it, its auxiliary head included."""
    config, checkpoint = tmp_path / "lanes.py", tmp_path / "lanes.pth"
    config.write_text(CONFIG)
    torch.manual_seed(0)
    network = detectors.find("segmentation", model=str(config)).structure()
    state = {name.removeprefix("model."): value for name, value in network.state_dict().items()}
    state["decode_head.conv_seg.weight"] = torch.randn_like(state["decode_head.conv_seg.weight"])
    state["auxiliary_head.conv_seg.bias"] = torch.zeros(5)
    torch.save({"state_dict": state, "meta": {"epoch": 1}, "loss": np.float64(0.5)}, checkpoint)
    return str(config), str(checkpoint), state


@needs_mmseg
def test_a_config_says_how_images_are_wanted(lane_config):
    wanted = detectors.find("segmentation", model=lane_config[0]).preprocess
    assert (wanted.size, wanted.bgr) == ((64, 128), False)
    assert wanted.mean == pytest.approx((0.5, 0.4, 0.2))
    assert wanted.std == pytest.approx((0.2, 0.2, 0.4))


@needs_mmseg
@torch.no_grad()
def test_the_network_computes_what_mmseg_does(lane_config):
    from mmengine.registry import MODELS, DefaultScope

    config, checkpoint, state = lane_config
    network = detectors.find("segmentation", model=config).load(Path(checkpoint))
    section = loading.read(config).description.model
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = MODELS.build(section).eval()
    theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith("auxiliary")})
    images = torch.randn(2, 3, 64, 128)
    logits = theirs(images, mode="tensor")
    assert logits.shape[2:] == (8, 16)
    expected = F.interpolate(logits, (64, 128), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(images), expected)


@needs_mmseg
def test_a_run_on_a_config_and_its_artifact_that_needs_no_config(ptq, tmp_path, lane_config):
    config, checkpoint, _ = lane_config
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_pictures(pictures, 12)
    settings = {
        "task.family": "segmentation",
        "task.model": config,
        "task.checkpoint": checkpoint,
        "task.images": pictures,
        "task.calibration": 4,
        "steps.1.selective-focus.iterations": 8,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, _, err = ptq("quantize", "--plugin", "lane", "--output", tmp_path / "run", *sets)
    assert code == 0, err
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    assert 0 < after["lds"] < 50
    Path(config).unlink()
    detector = ptq_lane.load(tmp_path / "run")
    assert detector.preprocess.size == (64, 128)
    assert len(detector([np.zeros((32, 64, 3), np.uint8)])) == 1


@needs_mmseg
@pytest.mark.parametrize("name", ["antigravity", "os.system", "mmengine.fileio.load", "mmseg.antigravity"])
def test_a_stored_type_that_is_not_registered_is_refused(name):
    import sys

    model = {"type": "EncoderDecoder", "backbone": {"type": name}}
    saved = {"family": "segmentation", "model": {"scope": "mmseg", "model": model}}
    with pytest.raises(ModelError, match="which is not registered"):
        detectors.find_saved(saved, FILE).structure()
    assert "antigravity" not in sys.modules


@needs_mmseg
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "mmseg:pidnet-z"}, "mmseg ships no such config"),
        ({"model": "nowhere/x.py"}, "is no file: give a config"),
        ({}, "a config of OpenMMLab has no weights, set task.checkpoint"),
    ],
)
def test_what_goes_wrong_is_one_sentence(ptq, tmp_path, lane_config, settings, sentence):
    chosen = {"family": "segmentation", "model": lane_config[0]} | settings
    sets = [part for key, value in chosen.items() for part in ("--set", f"task.{key}={value}")]
    code, _, err = ptq("quantize", "--plugin", "lane", "--output", tmp_path / "run", *sets)
    assert code == 2
    assert sentence in " ".join(err.split())


@needs_mmseg
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise SystemExit(3)", "the config cannot be read"),
        ("default_scope = 'mmpose'\nmodel = dict(type='X')", "its default_scope is 'mmpose'"),
        ("default_scope = 'mmseg'", "the config cannot be read"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, text, sentence):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ModelError, match=sentence):
        loading.read(str(file))


@needs_mmseg
def test_cascades_are_refused():
    found = detectors.find("segmentation", model="mmseg:ocrnet_hr18s_4xb4-80k_ade20k-512x512")
    with pytest.raises(ModelError, match="a CascadeEncoderDecoder is not supported"):
        found.structure()


# With mmdet


class Columns(Adapter):
    """Reads the scores of a RetinaNet's coarsest level as an upright lane in its best column."""

    name = "columns"
    confidence_heads = frozenset({"score"})

    def heads(self, outputs):
        return {"score": outputs[0][-1]}

    def confidence(self, outputs):
        return {"score": outputs[0][-1].sigmoid()}

    def decode(self, outputs):
        columns = outputs[0][-1].amax((1, 2)).argmax(1)
        rows = self.frame.rows
        return [Lanes(rows, np.full((1, len(rows)), 8.0 * int(one)), np.zeros(1, int)) for one in columns]


@needs_mmdet
@torch.no_grad()
def test_a_detector_of_mmdet_is_read_by_an_adapter_of_ones_own():
    found = detectors.find(f"{__name__}:Columns", model="mmdet:retinanet_r18_fpn_1x_coco")
    outputs = found.structure()(torch.randn(1, 3, 64, 128))
    adapter = found.adapter(ptq_lane.Frame(128, 64))
    detectors.check(adapter, outputs, 1)
    again = detectors.find_saved({"family": found.family, "model": found.model}, FILE)
    assert again.structure().state_dict().keys() == found.structure().state_dict().keys()
