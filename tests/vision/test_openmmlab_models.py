"""OpenMMLab models against the libraries themselves; skipped where these are not installed, as in CI."""

import collections
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ptq_vision.openmmlab import checkpoints, evaluation, loading, source
from ptq_vision.openmmlab.description import describe, parse
from ptq_vision.openmmlab.evaluation import Boxes
from ptq_vision.openmmlab.preprocessing import Preprocessing
from ptq_vision.openmmlab.task_detection import Detection, DetectionOptions
from ptq_vision.openmmlab.wrap import Network
from ptqcore import ArtifactError, DataError, ModelError, put_weights
from ptqcore.audit import never_called
from ptqcore.dataflow import trace

mmseg = pytest.importorskip("mmseg")
mmdet = pytest.importorskip("mmdet")

PIDNET = "mmseg:pidnet-s_2xb6-120k_1024x1024-cityscapes"
FAST_SCNN = "mmseg:fast_scnn_8xb4-160k_cityscapes-512x1024"
SEGMENTORS = {
    PIDNET: (19, 8, 16),
    FAST_SCNN: (19, 8, 16),
    "mmseg:bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024": (19, 8, 16),
    "mmseg:segformer_mit-b0_8xb1-160k_cityscapes-1024x1024": (19, 16, 32),
}
RTMDET = "mmdet:rtmdet_tiny_8xb32-300e_coco"
RETINANET = "mmdet:retinanet_r18_fpn_1x_coco"
FCOS = "mmdet:fcos_r50-caffe_fpn_gn-head_1x_coco"
YOLOX = "mmdet:yolox_tiny_8xb8-300e_coco"
DETECTORS = {RTMDET: (80, 4), YOLOX: (80, 4, 1)}
SIZE = (64, 128)


def random_images(count=1, size=SIZE, seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(network, images):
    found = network(images)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Loading and the deployed network


@pytest.mark.parametrize("name", SEGMENTORS)
def test_a_segmentor_returns_logits(name):
    network = Network(loading.load(name))
    assert not network.training
    (logits,) = outputs(network, random_images())
    assert logits.shape == (1, *SEGMENTORS[name])
    assert loading.kind(network.model) == loading.kind(loading.read(name)) == "segmentation"


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_returns_its_kinds_of_tensors_level_by_level(name):
    network = Network(loading.load(name))
    shapes = [tuple(found.shape) for found in outputs(network, random_images())]
    levels = [(SIZE[0] // stride, SIZE[1] // stride) for stride in (8, 16, 32)]
    assert shapes == [(1, channels, *level) for channels in DETECTORS[name] for level in levels]
    assert loading.kind(network.model) == loading.kind(loading.read(name)) == "detection"


@pytest.mark.parametrize("name", [*SEGMENTORS, *DETECTORS])
def test_what_is_stored_builds_the_same_structure(name):
    description = loading.read(name)
    text = describe(description)
    assert parse(text) == description
    first, second = (
        Network(loading.build(description)),
        Network(loading.build(parse(text), seed=1)),
    )
    second.load_state_dict(first.state_dict())
    assert same(outputs(first, random_images()), outputs(second, random_images()))


@pytest.mark.parametrize("name", [*SEGMENTORS, *DETECTORS])
def test_what_is_stored_names_no_file_and_no_address(name):
    text = describe(loading.read(name))
    assert not re.search(r"https?:|\.pth|\.py\b|SyncBN|Pretrained|/", text)


@pytest.mark.parametrize("name", [PIDNET, RTMDET])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(name):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    states = [loading.load(name, seed=seed).state_dict() for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(1), expected)
    assert same(list(states[0].values()), list(states[1].values()))
    assert not same(list(states[0].values()), list(states[2].values()))


@pytest.mark.parametrize("name", [*SEGMENTORS, *DETECTORS])
def test_layers_are_of_torchs_own_classes(name):
    kinds = {type(layer) for layer in loading.load(name).modules() if isinstance(layer, nn.Conv2d)}
    assert kinds == {nn.Conv2d}


@pytest.mark.parametrize("name", [*SEGMENTORS, *DETECTORS])
def test_the_network_is_the_same_function_as_the_model(name):
    model = loading.load(name)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        found = model(random_images(), mode="tensor")
    expected = [found] if isinstance(found, torch.Tensor) else [level for kind in found for level in kind]
    network = Network(model)
    assert not any(getattr(module, "inplace", False) for module in network.modules())
    assert same(outputs(network, random_images()), expected)


@pytest.mark.parametrize("name", [*SEGMENTORS, *DETECTORS])
def test_every_module_has_one_path_and_every_layer_is_called_once(name):
    network = Network(loading.load(name))
    paths = [id(module) for _, module in network.named_modules(remove_duplicate=False)]
    assert len(paths) == len(set(paths))
    calls = collections.Counter()
    for path, module in network.named_modules():
        module.register_forward_hook(lambda module, args, output, path=path: calls.update([path]))
    outputs(network, random_images())
    assert all(calls[path] <= 1 for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    assert calls["model.decode_head" if name in SEGMENTORS else "model.bbox_head"] == 1


def test_layers_that_only_training_runs_are_known():
    network = Network(loading.load(PIDNET))
    idle = never_called(network, trace(network, lambda: network(random_images())))
    assert {path.rpartition("decode_head.")[2].split(".")[0] for path in idle} == {
        *("p_head", "d_head", "p_cls_seg", "d_cls_seg")
    }
    before = outputs(network, random_images())
    with torch.no_grad():
        for path in idle:
            network.get_submodule(path).weight.fill_(torch.nan)
    assert same(outputs(network, random_images()), before)


def test_a_config_file_of_the_user(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        f"_base_ = {str(loading._shipped('mmdet', 'rtmdet_tiny_8xb32-300e_coco'))!r}\n"
        "model = dict(bbox_head=dict(num_classes=3))\n"
    )
    description = loading.read(str(config))
    assert str(tmp_path) not in describe(description)
    assert outputs(Network(loading.build(description)), random_images())[0].shape[1] == 3


def test_a_config_file_without_a_scope(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("model = dict(type='EncoderDecoder')\n")
    assert loading.read(str(config)).scope == "mmseg"


# Errors


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (PIDNET[:-1], "mmseg ships no such config; did you mean 'mmseg:pidnet-s_2xb6"),
        ("mmdet:nothing-like-it", "'mmdet:nothing-like-it': mmdet ships no such config$"),
        ("/no/such/config.py", "'/no/such/config.py' does not exist"),
        ("mmdet:faster-rcnn_r50_fpn_1x_coco", "a FasterRCNN is not supported"),
        ("mmdet:detr_r50_8xb2-150e_coco", "a DETR is not supported"),
        ("mmdet:rtmdet-ins_tiny_8xb32-300e_coco", "a RTMDet is not supported"),
    ],
)  # fmt: skip
def test_models_that_are_not_there_or_not_supported(model, sentence):
    with pytest.raises(ModelError, match=sentence):
        Network(loading.load(model))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = dict(\n", "the config cannot be read"),
        ("raise ValueError('wrong\\nhere')", "the config cannot be read: wrong here"),
        ("a = 1", "has no section 'model'"),
        ("model = dict(type='Nothing')", "'Nothing' is known to neither mmseg nor mmdet"),
        ("default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')", "cannot build the model: .*mis"),
    ],
)  # fmt: skip
def test_a_wrong_config_file(tmp_path, text, sentence):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ModelError, match=sentence):
        loading.load(str(tmp_path / "c.py"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"state_dict": loading.load(FAST_SCNN).state_dict()}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match=r"task\.checkpoint .* does not fit the model: it has"):
        loading.load(PIDNET, str(tmp_path / "c.pth"))


# The segmentation task's way to a model


def test_a_source_makes_the_network_with_the_weights_of_a_checkpoint(tmp_path):
    model = loading.load(FAST_SCNN, seed=4)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state | {"module.auxiliary_head.x": torch.ones(1)}}, tmp_path / "c.pth")
    found = source.find(FAST_SCNN)
    network = found.structure(None).eval()
    put_weights(network, found.rename(checkpoints.read(str(tmp_path / "c.pth"))), tmp_path)
    assert same(outputs(network, random_images()), outputs(Network(model), random_images()))
    how = found.preprocess
    assert (how.size, how.order, how.scale, how.mean) == (
        (1024, 2048),
        "rgb",
        1.0,
        (123.675, 116.28, 103.53),
    )


def test_a_source_is_found_again_by_the_file_it_keeps(tmp_path):
    found = source.find(FAST_SCNN)
    for name, text in found.files.items():
        (tmp_path / name).write_text(text)
    assert source.handles(FAST_SCNN)
    assert source.handles(str(tmp_path / found.name))
    again = source.find(str(tmp_path / found.name))
    assert (again.files, again.preprocess) == (found.files, found.preprocess)
    assert again.structure(19).state_dict().keys() == found.structure(19).state_dict().keys()


def test_a_scale_that_only_bounds_the_sides_is_no_size():
    assert source.find("mmseg:segformer_mit-b0_8xb2-160k_ade20k-512x512").preprocess.size == (512, 512)


def test_a_detector_is_no_source_of_a_segmentor():
    with pytest.raises(ModelError, match="is a detector: use the task detection"):
        source.find(RTMDET)


# Preprocessing against the libraries' own pipelines


@pytest.mark.parametrize("size", [(90, 200), (300, 120)])
@pytest.mark.parametrize("name", [RTMDET, YOLOX, PIDNET, RETINANET, FCOS])
def test_images_are_prepared_as_the_library_does(tmp_path, name, size):
    from mmengine.config import Config
    from mmengine.dataset import Compose
    from mmengine.registry import DefaultScope

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    scope, _, stem = name.partition(":")
    pipeline = Config.fromfile(str(loading._shipped(scope, stem))).test_pipeline
    pipeline = [step for step in pipeline if step["type"] != "LoadAnnotations"]
    description = loading.read(name)
    model = loading.build(description)
    __import__(f"{scope}.datasets")
    with DefaultScope.overwrite_default_scope(scope):
        data = Compose(pipeline)({"img_path": str(tmp_path / "image.png"), "img_id": 1})
        found = model.data_preprocessor(
            {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        )
    prepared = Preprocessing.of(description)(pixels)
    torch.testing.assert_close(prepared.image, found["inputs"])
    if scope == "mmdet":
        sample = data["data_samples"]
        assert (prepared.original, prepared.scale) == (sample.ori_shape, pytest.approx(sample.scale_factor))


# Boxes


@torch.no_grad()
def lively(name, classes=None, seed=0):
    """A detector with random weights whose scores and boxes spread widely on smooth pictures."""
    description = loading.read(name)
    if classes is not None:
        description.model["bbox_head"]["num_classes"] = classes
    model = loading.build(description, seed)
    generator = torch.Generator().manual_seed(seed)
    prepare = Preprocessing.of(description, size=(128, 128))
    images = torch.cat([prepare(picture).image for picture in smooth_pictures(4)])

    def rescale(layer, _, output):
        exponent = layer.out_channels == 4 and name == YOLOX
        layer.weight.mul_((0.3 if exponent else 2) / output.std())
        layer.bias.fill_(0.5 if layer.out_channels == 4 else -1.5)

    handles = []
    for path, layer in model.bbox_head.named_modules():
        if isinstance(layer, nn.Conv2d) and re.search(r"rtm_cls|rtm_reg|multi_level_conv_", path):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            handles.append(layer.register_forward_hook(rescale))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(images, mode="tensor")
    for handle in handles:
        handle.remove()
    return model.eval()


def smooth_pictures(count, size=(70, 100)):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        noise = torch.rand(1, 3, 6, 8, generator=generator)
        smooth = nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)[0] * 255
        yield smooth.byte().permute(1, 2, 0).numpy()


def photos(folder, count):
    folder.mkdir()
    for index, picture in enumerate(smooth_pictures(count)):
        Image.fromarray(picture).save(folder / f"{index:02}.png")
    return folder


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_decoded_as_the_library_does(name):
    from mmdet.structures import DetDataSample

    model = lively(name)
    network = Network(model)
    (pixels,) = smooth_pictures(1)
    prepared = Preprocessing.of(loading.read(name), size=(128, 128))(pixels)
    assert prepared.image.shape == (1, 3, 128, 128)
    meta = {"img_shape": (128, 128), "ori_shape": (70, 100), "scale_factor": prepared.scale}
    with torch.no_grad():
        (sample,) = model(prepared.image, [DetDataSample(metainfo=meta)], mode="predict")
    found = evaluation.detect(network, prepared)
    assert len(found.scores) > 10
    assert torch.equal(found.corners, sample.pred_instances.bboxes)
    assert torch.equal(found.scores, sample.pred_instances.scores)
    assert torch.equal(found.labels, sample.pred_instances.labels)


def random_boxes(count, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    corners = torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=generator) * 30], 1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Boxes(corners, torch.rand(count, generator=generator), labels)


def shifted(boxes, by, seed):
    noise = by * torch.randn(boxes.corners.shape, generator=torch.Generator().manual_seed(seed))
    return Boxes(boxes.corners + noise, boxes.scores, boxes.labels)


def test_average_precision_is_that_of_mmdet(tmp_path):
    from mmdet.evaluation import CocoMetric

    truth = {image: random_boxes(20, image) for image in (1, 2, 3)}
    found = {image: shifted(boxes, 1.0, image) for image, boxes in truth.items()}
    annotations = evaluation.as_truth(truth, 3)
    for category, name in zip(annotations["categories"], "abc", strict=True):
        category["name"] = name
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    metric = CocoMetric(ann_file=str(tmp_path / "truth.json"))
    metric.dataset_meta = {"classes": ["a", "b", "c"]}
    for image, boxes in found.items():
        instances = {"bboxes": boxes.corners, "scores": boxes.scores, "labels": boxes.labels}
        sample = {"pred_instances": instances, "img_id": image, "ori_shape": (100, 100)}
        metric.process({}, [sample])
    expected = metric.evaluate(3)["coco/bbox_mAP"]
    ours = evaluation.average_precision(annotations, found, [1, 2, 3])
    assert 0.2 < expected < 0.95
    assert ours / 100 == pytest.approx(expected, abs=6e-4)


def test_average_precision_of_one_box_by_hand():
    """Intersection 8 over union 10 = 0.8 counts as found at 0.50, 0.55, … 0.80 (7 thresholds of 10)."""
    truth = {
        1: Boxes(torch.tensor([[0.0, 0.0, 10.0, 1.0]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    }
    found = {
        1: Boxes(torch.tensor([[0.0, 0.0, 8.001, 1.0]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    }
    assert evaluation.average_precision(evaluation.as_truth(truth, 1), found, [1]) == pytest.approx(70)


def test_every_crowd_agrees_with_itself():
    """Also where one class has more boxes in an image than COCO counts, and another image has few."""
    crowds = {1: random_boxes(400, 1, classes=2), 2: random_boxes(150, 2, classes=1), 3: random_boxes(5, 3)}
    truth = evaluation.as_truth({image: boxes.confident() for image, boxes in crowds.items()}, 3)
    assert evaluation.average_precision(truth, crowds, [1, 2, 3]) == pytest.approx(100)


def test_nothing_found_is_a_precision_of_nothing():
    nothing = {1: Boxes(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))}
    truth = evaluation.as_truth({1: random_boxes(3, 1)}, 3)
    assert evaluation.average_precision(truth, nothing, [1, 2, 3]) == 0
    with pytest.raises(DataError, match="hold no box in the images"):
        evaluation.average_precision(evaluation.as_truth(nothing, 3), {1: random_boxes(3, 1)}, [1, 2, 3])


# The task


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a config of 3 classes, a checkpoint, images and, as annotations, what it finds."""
    base = tmp_path_factory.mktemp("detection")
    shipped = loading._shipped("mmdet", "rtmdet_tiny_8xb32-300e_coco")
    (base / "config.py").write_text(
        f"_base_ = {str(shipped)!r}\nmodel = dict(bbox_head=dict(num_classes=3))\n"
    )
    torch.save({"state_dict": lively(RTMDET, classes=3).state_dict()}, base / "weights.pth")
    photos(base / "images", 5)
    task = make_task(base, base, calibration=1)
    network = task.load_model()
    found = {
        number + 1: evaluation.detect(network, task._prepare(task._images.read(number))).confident()
        for number in range(5)
    }
    truth = evaluation.as_truth(found, 3)
    ids = {1: 7, 2: 20, 3: 31}
    for entry in truth["categories"]:
        entry["id"] = ids[entry["id"]]
    for entry in truth["annotations"]:
        entry["category_id"] = ids[entry["category_id"]]
    for entry in truth["images"]:
        entry["file_name"] = f"{entry['id'] - 1:02}.png"
    (base / "labels.json").write_text(json.dumps(truth))
    return base


def make_task(base, workspace, **options):
    defaults = {
        "model": str(base / "config.py"),
        "checkpoint": str(base / "weights.pth"),
        "images": str(base / "images"),
        "calibration": 2,
        "size": 64,
    }
    return Detection(DetectionOptions(**(defaults | options)), 0, workspace)


def test_full_precision_agrees_with_itself_and_noise_does_not(base, tmp_path):
    task = make_task(base, tmp_path, labels=str(base / "labels.json"))
    model = task.load_model()
    assert [sample.shape for sample in task.samples(model)] == [(1, 3, 64, 64)] * 2
    assert task.evaluate(model) == {
        "output_error": 0.0,
        "agreement_map": pytest.approx(100),
        "map": pytest.approx(100),
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    after = task.evaluate(model)
    assert 0 < after["agreement_map"] < 99
    assert 0 < after["map"] < 99


def test_without_annotations_there_is_only_agreement(base, tmp_path):
    task = make_task(base, tmp_path, max_images=1)
    expected = {"output_error": 0.0, "agreement_map": pytest.approx(100)}
    assert task.evaluate(task.load_model()) == expected


def test_the_images_that_calibrate_are_not_those_that_are_evaluated(base, tmp_path):
    task = make_task(base, tmp_path)
    task.load_model()
    assert (task._calibration, task._evaluated) == ([0, 4], [1, 2, 3])


def test_an_artifacts_assets_build_the_structure(base, tmp_path):
    task = make_task(base, tmp_path)
    model = task.load_model()
    task.save_assets(tmp_path)
    built = Detection.build(tmp_path)
    built.load_state_dict(model.state_dict())
    assert same(outputs(model, random_images()), outputs(built, random_images()))
    prepared = json.loads((tmp_path / "preprocessing.json").read_text())
    assert (prepared["size"], prepared["rgb"]) == ([64, 64], False)


def test_assets_that_are_missing_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"model\.json cannot be read"):
        Detection.build(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": PIDNET, "checkpoint": None}, "is a segmentor: use the task segmentation"),
        ({"images": "/no/such/folder"}, "task.images '/no/such/folder' does not exist"),
        ({"calibration": 5}, "task.calibration is 5, but task.images .* holds 5"),
        ({"calibration": "/no/such/folder"}, "task.calibration '/no/such/folder' does not exist"),
        ({"labels": "/no/labels.json"}, "'/no/labels.json' cannot be read as a COCO file: .*No such file"),
    ],
)  # fmt: skip
def test_wrong_options(base, tmp_path, options, sentence):
    with pytest.raises((DataError, ModelError), match=sentence):
        make_task(base, tmp_path, **options).load_model()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda truth: truth.pop("images"), "cannot be read as a COCO file: 'images'"),
        (lambda truth: truth["categories"].pop(), "has 2 categories, but the model knows 3 classes"),
        (lambda truth: truth["images"][2].update(file_name="x.png"), "lacks 1 of the 5 images .* 'x.png'"),
        (lambda truth: truth["images"][2].pop("file_name"), "an entry of 'images' has no 'file_name'"),
    ],
)  # fmt: skip
def test_wrong_annotations(base, tmp_path, change, sentence):
    truth = json.loads((base / "labels.json").read_text())
    change(truth)
    (tmp_path / "labels.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match=sentence):
        make_task(base, tmp_path, labels=str(tmp_path / "labels.json")).load_model()


def test_a_model_that_finds_nothing_is_compared_by_its_outputs(base, tmp_path):
    task = make_task(base, tmp_path, checkpoint=None)
    assert task.evaluate(task.load_model()) == {"output_error": 0.0}
