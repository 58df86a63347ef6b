"""Plugins with bugs: the sentence names plugin, step and block, the journal stays, and nothing is lost."""

import importlib
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from fake_distribution import write_distribution

from ptqcore import artifact
from ptqcore.requirement import unmet
from ptqcore.summary import describe_plugins

SOURCE = """
import random, sys
import numpy, torch
from torch import nn
from ptqcore import Plugin, PtqError, Step, Task, ModelError
from ptqcore.observers import MinMax

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())

class Guests(Task):
    name = "guests"

    def load_model(self):
        return Net()

    def samples(self, model):
        return [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def evaluate(self, model):
        return {"sum": float(model(self.samples(model)[0]).detach().sum())}

    def save_assets(self, folder):
        pass

    @classmethod
    def build(cls, folder):
        return Net()

class Stretch(Step):
    name = "stretch"

    VERB

plugin = Plugin("guest", tasks={"guests": "MODULE:Guests"}, steps={"stretch": "MODULE:Stretch"})
"""
NOTHING = "pass"
RECIPE = """
name: guest
task: {kind: guests}
quant: {weights: {bits: 4, granularity: channel}}
steps: [stretch, round]
"""


@pytest.fixture
def guest(tmp_path, monkeypatch, ptq):
    """Install the plugin with a method of its step, and quantize with it into the folder `out`."""
    (tmp_path / "guest.yaml").write_text(RECIPE)
    before = set(sys.modules)
    made = 0

    def quantize(method=NOTHING, *arguments, body=SOURCE):
        nonlocal made
        made += 1
        site, name = tmp_path / f"site{made}", f"ptq-guest{made}"
        site.mkdir()
        module = name.replace("-", "_")
        method = dedent(method).strip().replace("\n", "\n    ")
        code = body.replace("MODULE", module).replace("VERB", method)
        write_distribution(site, name, "guest", code)
        for other in [*sys.path]:
            if Path(other).parent == tmp_path:
                sys.path.remove(other)
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()
        recipe = tmp_path / "guest.yaml"
        return ptq(
            "quantize", "--plugin", "guest", "--recipe", recipe, "--output", tmp_path / "out", *arguments
        )

    yield quantize
    for name in set(sys.modules) - before:
        if name.startswith("ptq_guest"):
            del sys.modules[name]


def sentence(result, code):
    """The only line on standard error that is no progress; the exit code is as it must be."""
    found, _, err = result
    assert found == code, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if " done in " not in line]
    assert line.startswith("error: ")
    return line


FAILS = """
def block(self, block, calibration):
    if block.path == "second":
        {action}
"""


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise KeyError('width')", "KeyError: 'width'"),
        ("raise RuntimeError", "RuntimeError"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("assert False, 'never'", "AssertionError: never"),
        ("block.model.get_submodule('none')", "AttributeError: Net has no attribute `none`"),
        ("torch.zeros(2) @ torch.zeros(3)", "RuntimeError: inconsistent tensor size"),
    ],
)
def test_an_exception_in_a_step_is_named_and_the_run_goes_on_once_it_is_mended(
    guest, tmp_path, action, said
):
    line = sentence(guest(FAILS.format(action=action)), 1)
    assert f"error: step 'stretch' of plugin 'guest' failed in block 'second': {said}" in line
    file = tmp_path / "out/.work/traceback.txt"
    assert line.endswith(f"(its traceback is in {file})")
    assert "in block\n" in file.read_text()
    journal = {path.name for path in (tmp_path / "out/.work").glob("block-*.json")}
    assert journal == {"block-0000.json"}
    assert not (tmp_path / "out/manifest.json").exists()
    seen = tmp_path / "seen.txt"
    note = f"""
    def block(self, block, calibration):
        open({str(seen)!r}, "a").write(block.path + " ")
    """
    code, _, err = guest(note, "--resume")
    assert code == 0, err
    assert seen.read_text() == "second third "
    assert not (tmp_path / "out/.work").exists()
    resumed = (tmp_path / "out/model.safetensors").read_bytes()
    assert guest()[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == resumed


def test_a_step_that_fails_leaves_the_earlier_artifact(guest, tmp_path):
    assert guest()[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    sentence(guest(FAILS.format(action="raise KeyError")), 1)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before
    artifact.read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "doing"),
    [
        ("def __init__(self, options, context): raise KeyError", "to begin"),
        ("def prepare(self, model, flow, run): raise KeyError", "to prepare"),
        ("def transform(self, block, calibration): raise KeyError", "in block 'first'"),
        ("def before(self, block, calibration): raise KeyError", "in block 'first'"),
        ("def after(self, block, calibration): raise KeyError", "in block 'first'"),
        ("def finish_span(self, blocks, chain): raise KeyError", "behind block 'first'"),
        ("def finish(self, model): raise KeyError", "to finish"),
    ],
)
def test_every_verb_of_a_step_is_named(guest, method, doing):
    line = sentence(guest(method), 1)
    assert f"error: step 'stretch' of plugin 'guest' failed {doing}: KeyError (its traceback" in line


@pytest.mark.parametrize("action", ["torch.zeros(2**50)", "numpy.zeros(2**50)", "raise MemoryError"])
def test_a_step_that_memory_has_no_room_for_loses_nothing(guest, tmp_path, action):
    line = sentence(guest(FAILS.format(action=action)), 2)
    assert "memory is used up: step 'stretch' of plugin 'guest' in block 'second' could not go on" in line
    assert "fewer or shorter calibration samples" in line
    assert {path.name for path in (tmp_path / "out/.work").glob("block-*.json")} == {"block-0000.json"}
    assert guest(NOTHING, "--resume")[0] == 0


def test_what_a_step_says_to_the_user_is_left_as_it_is(guest):
    said = FAILS.format(action="raise ModelError('block second is too wide: use fewer bits')")
    assert sentence(guest(said), 2) == "error: block second is too wide: use fewer bits"


RESHAPES = """
def VERB(self, block, calibration):
    if block.path == "second":
        layer = block.module
        layer.weight = nn.Parameter(layer.weight[:, :7])
"""


@pytest.mark.parametrize("verb", ["transform", "before", "block"])
def test_a_step_that_changes_the_shape_of_a_weight_is_named(guest, verb):
    line = sentence(guest(RESHAPES.replace("VERB", verb)), 1)
    assert "step 'stretch' of plugin 'guest' changed the shape of the weight of layer 'second'" in line
    assert "from [8, 8] to [8, 7]: steps must keep it" in line


def test_a_step_that_changes_what_a_block_returns_is_named(guest):
    method = """
    def after(self, block, calibration):
        if block.path == "second":
            block.module.register_forward_hook(lambda layer, args, output: output[:, :7])
    """
    line = sentence(guest(method), 1)
    assert "step 'stretch' of plugin 'guest' and step 'round' of plugin 'core' changed the shapes" in line
    assert "that block 'second' returns from [[4, 8]] to [[4, 7]]: steps must keep them" in line


def test_a_step_that_breaks_a_block_is_named(guest):
    method = """
    def after(self, block, calibration):
        block.module.bias = None if block.path != "second" else nn.Parameter(torch.zeros(3))
    """
    line = sentence(guest(method), 1)
    assert "failed to leave block 'second' in working order: RuntimeError: " in line


@pytest.mark.parametrize(
    ("old", "new", "doing"),
    [
        ("return Net()\n\n    def samples", "raise KeyError\n\n    def samples", "to load the model"),
        ("return [torch.randn", "raise KeyError; [torch.randn", "to give calibration samples"),
        ("return {", "raise KeyError; {", "to measure the model (full precision)"),
        ("        pass", "        raise KeyError", "to save what builds the model"),
    ],
)
def test_a_task_that_fails_is_named(guest, old, new, doing):
    assert old in SOURCE
    line = sentence(guest(body=SOURCE.replace(old, new)), 1)
    assert f"error: task 'guests' of plugin 'guest' failed {doing}: KeyError" in line


def test_random_numbers_of_a_step_are_the_same_whether_the_run_was_interrupted_or_not(guest, tmp_path):
    draws = """
    def block(self, block, calibration):
        with torch.no_grad():
            block.module.weight += 0.1 * torch.rand(1) + 0.1 * random.random() + 0.1 * numpy.random.rand()
        {more}
    """
    assert guest(draws.format(more=""))[0] == 0
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    sentence(guest(draws.format(more="if block.path == 'third': raise KeyError")), 1)
    assert guest(draws.format(more=""), "--resume")[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_a_plugin_that_cannot_be_imported_is_named(guest):
    line = sentence(guest(body="import no_such_package_at_all"), 2)
    assert "plugin 'guest' (ptq-guest1 0.1) could not be loaded: ModuleNotFoundError" in line


def test_a_step_that_cannot_be_imported_is_named(guest):
    line = sentence(guest(body=SOURCE.replace("MODULE:Stretch", "no_such_module:Stretch")), 2)
    assert "plugin 'guest' cannot import no_such_module:Stretch: ModuleNotFoundError" in line


# Made for another core


@pytest.mark.parametrize("needed", [">=0.2", "==99", "<0.1,>=0.0.3", "~=0.2.0", ">=0.2,<0.3"])
def test_a_plugin_for_another_version_of_the_core_is_not_even_imported(tmp_path, monkeypatch, ptq, needed):
    write_distribution(
        tmp_path, "ptq-old", "old", "raise SystemExit('imported')", requires=f"ptqcore{needed}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = sentence(ptq("quantize", "--plugin", "old"), 2)
    assert "plugin 'old' (ptq-old 0.1) could not be loaded: it is made for ptqcore " in line
    assert f"{needed}, and this is 0.1.0: install the ptq-old that goes with it" in line
    code, out, _ = ptq("plugins")
    assert code == 0
    assert "old (ptq-old 0.1): BROKEN: it is made for ptqcore" in out


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("ptqcore", None),
        ("ptqcore>=0.1,<0.2", None),
        ("ptqcore[onnx]>=0.1,<0.2", None),
        ("ptqcore (>=0.1.2)", ">=0.1.2"),
        ("ptqcore[onnx,openvino] >= 0.2", ">= 0.2"),
        ("ptqcore~=0.1", None),
        ("ptqcore~=0.1.1", "~=0.1.1"),
        ("ptqcore~=0.0.9", "~=0.0.9"),
        ("ptqcore==0.1", None),
        ("ptqcore!=0.1.0", "!=0.1.0"),
        ("ptqcore<=0.1", None),
        ("ptqcore>0.1", ">0.1"),
        ("ptqcore<0.1", "<0.1"),
        ("PTQcore==0.1.1", "==0.1.1"),
        ("ptqcore==0.1.*", None),
        ("ptqcore>=0.1.0rc1", None),
        ("ptqcore>=9; python_version<'3'", None),
        ("ptqcore-extras>=9", None),
        ("torch>=9", None),
    ],
)
def test_what_a_distribution_requires_of_the_core(requirement, expected):
    assert unmet(["numpy>=99", requirement], "0.1.0") == expected


def test_the_plugins_of_this_project_are_for_this_core():
    from ptqcore.plugin import discover

    listed = describe_plugins(discover())
    assert "made for ptqcore" not in listed
