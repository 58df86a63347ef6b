"""Classification and segmentation: which pictures do what, and figures known in advance.

The models read the colour: class 0 is red, 1 green, 2 blue.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ptq_vision.classification import Classification
from ptq_vision.rendered import rendered_images
from ptq_vision.segmentation import SegmentationOptions
from ptqcore import DataError, ModelError, RecipeError
from ptqcore.recipe import validate

RED, GREEN, BLUE = (200, 10, 0), (10, 200, 0), (0, 10, 200)
WHOLE = {"size": None, "scale": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.fixture
def colours(folder):
    """Ten pictures: 0 to 4 red, 5 to 7 green, 8 and 9 blue."""
    shades = [RED] * 5 + [GREEN] * 3 + [BLUE] * 2
    return folder({f"{number}.png": shade for number, shade in enumerate(shades)})


@pytest.fixture
def classify(task, tiny):
    def classify(**options):
        defaults = {"model": f"{tiny}:Corner", "preprocess": WHOLE, "calibration": 2}
        return task("classification", **(defaults | options))

    return classify


@pytest.fixture
def segment(task, tiny):
    def segment(**options):
        defaults = {"model": f"{tiny}:Pixels", "preprocess": WHOLE, "calibration": 1}
        return task("segmentation", **(defaults | options))

    return segment


def table(tmp_path, classes):
    lines = [f"{number}.png,{kind}" for number, kind in enumerate(classes)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *lines]))
    return str(tmp_path / "labels.csv")


def blinded(model):
    """A copy that sees no blue, and red and green alike but for a factor."""
    model.mix.weight.data[:, :, 0, 0] = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0]])
    return model


# Which pictures


def test_calibration_pictures_are_spread_and_held_out(classify, colours):
    task = classify(images=str(colours), calibration=4)
    samples = task.samples(task.load_model())
    assert [sample.shape for sample in samples] == [(1, 3, 8, 8)] * 4
    assert samples[0].dtype == torch.float32
    assert task.evaluated == [1, 2, 4, 5, 7, 8]  # 0, 3, 6 and 9 calibrate


def test_calibration_pictures_of_elsewhere_hold_nothing_out(classify, colours, folder):
    other = folder({"a.png": BLUE, "b.png": RED}, "other")
    task = classify(images=str(colours), calibration=str(other))
    samples = task.samples(task.load_model())
    assert task.evaluated == list(range(10))
    assert [int(sample[0].argmax(0)[0, 0]) for sample in samples] == [2, 0]


def test_rendered_pictures_calibrate_beside_real_ones(classify, colours):
    how = WHOLE | {"size": [8, 8], "crop": 1.0}
    task = classify(images=str(colours), calibration="rendered", preprocess=how)
    samples = task.samples(task.load_model())
    assert len(samples) == 64
    assert len(task.evaluated) == 10
    expected = rendered_images(1, 8, 8, seed=0, series=1).read(0)
    assert np.array_equal(samples[0][0].permute(1, 2, 0), expected)


def test_without_pictures_both_are_rendered_and_differ(classify):
    task = classify(calibration=3, max_images=2, preprocess={"size": 8})
    samples = task.samples(task.load_model())
    evaluated = [image for _, image in zip(task.evaluated, map(task.images.read, range(2)), strict=True)]
    assert len(samples) == 3
    assert len(task.evaluated) == 2
    assert not np.array_equal(evaluated[0], rendered_images(1, 8, 8, seed=0, series=1).read(0))


def test_at_most_max_images_are_evaluated_evenly_spaced(classify, colours):
    task = classify(images=str(colours), calibration=2, max_images=3)
    task.load_model()
    assert task.evaluated == [1, 5, 8]  # of 1 to 8


def test_calibration_that_leaves_nothing_to_evaluate(classify, colours):
    sentence = "task.calibration is 10, but task.images .* holds 10, and some must be left to evaluate"
    with pytest.raises(DataError, match=sentence):
        classify(images=str(colours), calibration=10).load_model()


def test_missing_calibration_pictures_name_their_key(classify, colours):
    with pytest.raises(DataError, match=r"task.calibration '/no' does not exist"):
        classify(images=str(colours), calibration="/no").load_model()


# Options


def test_preprocessing_is_the_models_but_for_what_the_user_says(task):
    made = task("classification", preprocess={"size": 64, "mean": [0, 0, 0]}).options.preprocess
    assert (made.size, made.mean, made.std, made.crop) == (64, (0, 0, 0), (0.5, 0.5, 0.5), 0.875)
    assert task("classification", model="cifar-resnet-20").options.preprocess.size == (32, 32)


def test_what_counts_as_void_is_the_models_but_for_what_the_user_says(task, tiny):
    assert task("segmentation").options.ignore_label == 11
    assert task("segmentation", ignore_label=3).options.ignore_label == 3
    assert task("segmentation", model=f"{tiny}:Pixels").options.ignore_label == 255


def test_segmentation_takes_whole_pictures_by_default(task, tiny):
    assert task("segmentation", model=f"{tiny}:Pixels").options.preprocess.size is None
    assert task("segmentation").options.preprocess.size == (360, 480)


def test_resolved_options_resolve_to_themselves(task):
    for kind in ("classification", "segmentation"):
        options = task(kind).options
        assert task(kind, **options.model_dump(mode="json")).options == options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"calibration": 0}, "calibration 0: give a number of images, a folder, or 'rendered'"),
        ({"calibration": True}, "calibration True: give"),
        ({"modle": "x"}, "'task.modle' is unknown; did you mean 'model'"),
        ({"batch": 0}, "'task.batch' is 0"),
        ({"ignore_label": 3}, "'task.ignore_label' is unknown"),
    ],
)
def test_wrong_options(task, options, sentence):
    with pytest.raises(RecipeError, match=sentence):
        task("classification", **options)


def test_an_unknown_model_is_known_before_anything_is_computed(task):
    with pytest.raises(ModelError, match="did you mean 'efficientnet-lite0'"):
        task("classification", model="efficientnet-lite1")


@pytest.mark.parametrize("preprocess", [{"size": 64}, {"size": [8, 8], "crop": 0.5}, {"crop": 0.5}])
def test_segmentation_shows_the_whole_picture(preprocess):
    with pytest.raises(RecipeError, match=r"size must be \[height, width\] or null, and crop 1"):
        validate(SegmentationOptions, {"preprocess": preprocess}, "task")


# Classification


def test_figures_of_a_classifier(classify, colours, tmp_path):
    labels = table(tmp_path, [0, 0, 0, 0, 0, 1, 1, 1, 0, 0])  # 1 to 8 are evaluated; 8 is blue
    task = classify(images=str(colours), labels=labels, batch=3)
    model = task.load_model()
    first = task.evaluate(model)
    assert first == {"top1": 100 * 7 / 8, "top5": 100, "agreement": 100, "logit_error": 0}
    second = task.evaluate(blinded(model))
    assert second.keys() == first.keys()
    assert second["top1"] == pytest.approx(
        100 * 1 / 8
    )  # the blue picture is taken for red, as its label says
    assert second["agreement"] == 0
    # Red (200, 10, 0) becomes (20, 200, 0), green (10, 200, 0) (400, 10, 0), blue (0, 10, 200) (20, 0, 0).
    wrong = 4 * (180**2 + 190**2) + 3 * (390**2 + 190**2) + (20**2 + 10**2 + 200**2)
    assert second["logit_error"] == pytest.approx(wrong / (8 * (200**2 + 10**2)))


def test_without_labels_only_agreement_is_told(classify, colours):
    task = classify(images=str(colours))
    assert task.evaluate(task.load_model()) == {"agreement": 100, "logit_error": 0}


def test_the_size_of_batches_changes_nothing(classify, folder, picture):
    shapes = [(8, 8), (8, 8), (9, 8), (8, 8), (8, 8), (8, 8)]
    path = folder({f"{i}.png": picture(*shape, seed=i) for i, shape in enumerate(shapes)})
    found = []
    for batch in (1, 2, 100):
        task = classify(images=str(path), calibration=1, batch=batch)
        found.append(dict(task.outputs(task.load_model(), "test")))
    assert list(found[0]) == list(found[1]) == list(found[2]) == [1, 2, 3, 4, 5]
    assert all(
        torch.equal(found[0][i], found[1][i]) and torch.equal(found[0][i], found[2][i]) for i in found[0]
    )


def test_labels_of_an_npz_file(classify, tmp_path):
    images = np.array([RED, GREEN, BLUE, RED], dtype=np.uint8)[:, :, None, None].repeat(4, 2).repeat(4, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1, 2, 1])
    task = classify(images=str(tmp_path / "a.npz"), calibration=1)
    assert task.evaluate(task.load_model())["top1"] == pytest.approx(200 / 3)


def test_a_class_that_the_model_has_not(classify, colours, tmp_path):
    task = classify(images=str(colours), labels=table(tmp_path, [0] * 9 + [3]))
    with pytest.raises(
        DataError, match=r"picture '9.png' is of class 3, but the model has the classes 0 to 2"
    ):
        task.load_model()


def test_pictures_that_the_model_does_not_take(classify, colours, tiny):
    sentence = (
        r"does not take images of shape \[3, 8, 8\], set task.preprocess.size: sides must be divisible"
    )
    with pytest.raises(ModelError, match=sentence):
        classify(images=str(colours), model=f"{tiny}:Picky").load_model()


def test_a_segmentation_network_is_no_classifier(classify, colours, tiny):
    task = classify(images=str(colours), model=f"{tiny}:Pixels")
    model = task.load_model()
    with pytest.raises(
        ModelError, match=r"returns \[3, 8, 8\] values for a picture, a classifier \[classes\]"
    ):
        task.evaluate(model)


# Segmentation


@pytest.fixture
def scenes(folder, tmp_path):
    """Two pictures 4 x 8, left half red, right half green, and label maps that know better in places."""
    pixels = np.full((4, 8, 3), RED, dtype=np.uint8)
    pixels[:, 4:] = GREEN
    maps = np.zeros((4, 8), dtype=np.uint8)
    maps[:, 4:] = 1
    maps[0, :4] = 2  # four pixels are blue, the model says red
    maps[3, 4:] = 255  # four are void
    (tmp_path / "maps").mkdir()
    for name in ("a", "b"):
        Image.fromarray(maps).save(tmp_path / "maps" / f"{name}.png")
    return folder({"a.png": pixels, "b.png": pixels}, "scenes"), tmp_path / "maps"


def test_figures_of_a_segmentation_network(segment, scenes):
    task = segment(images=str(scenes[0]), labels=str(scenes[1]))
    model = task.load_model()
    first = task.evaluate(model)
    # Red: 12 right of 16 found; green: 12 of 12; blue: none of 4.
    assert first == {
        "miou": pytest.approx(100 * (12 / 16 + 1 + 0) / 3),
        "dice": pytest.approx(100 * (24 / 28 + 1 + 0) / 3),
        "pixel_accuracy": pytest.approx(100 * 24 / 28),
        "agreement": 100,
    }
    model.mix.weight.data[1] = 0  # green is seen no more, and taken for red
    second = task.evaluate(model)
    assert second["agreement"] == 50
    assert second["pixel_accuracy"] == pytest.approx(100 * 12 / 28)
    assert second.keys() == first.keys()


def test_logits_of_half_the_resolution_are_resized_to_the_label_map(segment, scenes, tiny):
    task = segment(model=f"{tiny}:Coarse", images=str(scenes[0]), labels=str(scenes[1]))
    assert task.evaluate(task.load_model())["pixel_accuracy"] == pytest.approx(100 * 24 / 28)


def test_a_class_in_a_map_that_the_model_has_not(segment, scenes):
    task = segment(images=str(scenes[0]), labels=str(scenes[1]), ignore_label=7)
    model = task.load_model()
    with pytest.raises(DataError, match=r"map of 'b.png' holds 255, .* set task.ignore_label to it"):
        task.evaluate(model)


def test_a_classifier_is_no_segmentation_network(segment, scenes, tiny):
    task = segment(images=str(scenes[0]), model=f"{tiny}:Corner")
    model = task.load_model()
    with pytest.raises(ModelError, match="is it one for classification"):
        task.evaluate(model)


def test_segmentation_without_maps_tells_agreement_alone(segment, scenes):
    task = segment(images=str(scenes[0]))
    assert task.evaluate(task.load_model()) == {"agreement": 100}


# Assets


def test_assets_build_the_structure(task, tmp_path):
    torch.save(task_network(classes=4).state_dict(), tmp_path / "a.pth")
    made = task(
        "classification",
        model="cifar-resnet-20",
        checkpoint=str(tmp_path / "a.pth"),
        calibration=1,
        max_images=1,
    )
    model = made.load_model()
    (tmp_path / "assets").mkdir()
    made.save_assets(tmp_path / "assets")
    (tmp_path / "a.pth").unlink()
    built = Classification.build(tmp_path / "assets")
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert not built.training
    described = json.loads((tmp_path / "assets" / "model.json").read_text())
    assert described["model"] == "cifar-resnet-20"
    assert described["classes"] == 4
    assert described["preprocess"]["size"] == [32, 32]


def task_network(classes):
    from ptq_vision.cifar_resnet import CifarResNet

    return CifarResNet(20, classes)


def test_damaged_assets(tmp_path):
    with pytest.raises(ModelError, match=r"model.json does not describe a model"):
        Classification.build(tmp_path)
