"""A plugin by somebody else: built, installed, used and removed as a stranger would do it."""

import ast
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fake_distribution import write_distribution

import ptqcore
from ptqcore import QuantizedTensor, QuantSpec

TESTS = Path(__file__).parents[1]
TOY = TESTS / "third_party" / "ptq-toy"
QUANTIZE = TESTS.parent / "tools" / "quantize.py"
SMALL = ("--set", "task.width=16", "--set", "task.depth=1", "--set", "task.samples=2")
METRICS = {
    "plugin",
    "recipe",
    "before",
    "after",
    "size_bytes",
    "coverage",
    "seconds",
    "peak_memory_bytes",
    "exports",
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment that also sees the packages of the one that runs the tests."""

    folder: Path
    path: str = ""

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run its Python."""
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [self.path, os.environ.get("PYTHONPATH")]))
        command = [self.folder / "bin" / "python", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=self.folder, timeout=120
        )

    def must(self, *arguments: object) -> str:
        """Standard output of its Python, which must succeed."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: object) -> str:
        return self.must("-m", "pip", "--disable-pip-version-check", *arguments)

    def ptq(self, *arguments: object) -> str:
        return self.must("-c", "from ptqcore.cli import main; main()", *arguments)

    def refused(self, *arguments: object) -> str:
        """The one sentence with which `quantize.py` refuses."""
        done = self.run(QUANTIZE, *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The plugin, built from its own folder."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, TOY], check=True)
    (built,) = folder.glob("*.whl")
    return built


def new_environment(folder: Path, wheel: Path) -> Environment:
    """A fresh environment with the plugin in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    parent = sysconfig.get_paths()["purelib"]
    (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    environment = Environment(folder)
    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheel) -> Environment:
    return new_environment(tmp_path_factory.mktemp("environment") / "env", wheel)


@pytest.fixture(scope="module")
def artifact(environment, tmp_path_factory) -> Path:
    """The output folder of the plugin's default recipe."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    printed = environment.must(QUANTIZE, "--plugin", "toy", "--set", "task.depth=3", "--output", folder)
    assert str(folder / "report.html") in printed
    return folder


# Installed


def test_the_plugin_imports_public_names_only():
    sources = list((TOY / "ptq_toy").glob("*.py"))
    assert len(sources) == 5
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "ptqcore" for alias in node.names), source
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ptqcore":
                assert node.module == "ptqcore", source
                assert {alias.name for alias in node.names} <= set(ptqcore.__all__), source


def test_it_is_listed_with_all_that_it_brings(environment):
    assert (
        "toy (ptq-toy 1.2.3): tasks toy-regression; steps error-feedback-round; "
        "observers three-sigma; commands ptq toy; recipes feedback-w4a8, mixed-w4"
        in environment.ptq("plugins").splitlines()
    )


def test_its_recipes_are_listed(environment):
    lines = environment.ptq("recipe", "list", "--plugin", "toy").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["toy feedback-w4a8 (default)", "toy mixed-w4"]


def test_it_keeps_the_contract(environment, tmp_path):
    script = """if True:
        import sys
        from pathlib import Path
        from ptqcore.testing import check_plugin
        print("\\n".join(check_plugin("toy", Path(sys.argv[1]), ["task.width=8", "task.depth=1"])))
    """
    checked = environment.must("-c", script, tmp_path).splitlines()
    for name in ("task 'toy-regression'", "step 'error-feedback-round'", "observer 'three-sigma'"):
        assert f"{name} keeps its contract" in checked
    assert "commands of ptq toy: weights" in checked
    assert "recipe 'mixed-w4' is valid" in checked
    assert checked[-1].startswith("recipe 'feedback-w4a8' runs, twice with the same bytes")


# Its commands


def test_its_commands_are_listed_and_explained(environment):
    assert "Commands of the plugin toy." in environment.ptq("--help")
    assert "Toy networks." in environment.ptq("toy", "--help")
    assert "Count the weights of a network." in environment.ptq("toy", "weights", "--help")


def test_its_command_runs(environment):
    """Stem 3·3·3·4 + 4, one block 4·8 + 8 + 8·4 + 4, head 4·5 + 5."""
    assert environment.ptq("toy", "weights", "--width", "4", "--depth", "1") == "213\n"


def test_what_its_command_refuses_is_one_sentence_and_exit_code_2(environment):
    done = environment.run("-c", "from ptqcore.cli import main; main()", "toy", "weights", "--width", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --width is 0: give 1 or more\n"


@pytest.mark.parametrize(
    ("arguments", "imported"), [(["--help"], False), (["plugins"], False), (["toy", "--help"], True)]
)
def test_its_commands_are_imported_when_they_are_called_and_not_before(environment, arguments, imported):
    script = """if True:
        import sys
        from ptqcore.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code
        print("ptq_toy.commands" in sys.modules, "torch" in sys.modules)
    """
    assert environment.must("-c", script, *arguments).splitlines()[-1] == f"{imported} False"


# Used


def test_the_default_recipe_runs_from_end_to_end(artifact):
    metrics = json.loads((artifact / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == METRICS
    assert (metrics["plugin"], metrics["recipe"], metrics["exports"]) == ("toy", "feedback-w4a8", {})
    assert metrics["before"] == {"mse": 0.0, "max_error": 0.0}
    assert metrics["after"].keys() == metrics["before"].keys()
    assert 0 < metrics["after"]["mse"] < metrics["after"]["max_error"] < 1
    assert 0 < metrics["size_bytes"]["after"] < metrics["size_bytes"]["before"] / 2
    assert metrics["seconds"] > 0
    assert metrics["peak_memory_bytes"] > 0
    report = (artifact / "report.html").read_text(encoding="utf-8")
    assert "toy-regression" in report
    assert "max_error" in report


def test_every_layer_of_it_is_quantized_as_the_recipe_says(artifact):
    layers = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["layers"]
    assert list(layers) == [
        "0.conv",
        *(f"{block}.{layer}" for block in (1, 2, 3) for layer in ("expand", "contract")),
        "4",
    ]
    for entry in layers.values():
        assert (entry["weight"]["bits"], entry["weight"]["group_size"]) == (4, 8)
        assert (entry["input"]["bits"], entry["input"]["dynamic"]) == (8, False)


def test_the_artifact_loads_in_a_fresh_process_with_the_metrics_that_were_measured(
    environment, artifact, tmp_path
):
    script = """if True:
        import json, sys
        from pathlib import Path
        import ptqcore
        from ptq_toy.task import ToyOptions, ToyRegression
        model = ptqcore.load(sys.argv[1])
        assert type(model[0].conv) is ptqcore.QuantConv2d
        assert type(model[2].expand) is type(model[4]) is ptqcore.QuantLinear
        assert not model.training
        task = ToyRegression(ToyOptions(depth=3), 0, Path(sys.argv[2]))
        task.evaluate(task.load_model())
        print(json.dumps(task.evaluate(model)))
    """
    measured = json.loads((artifact / "metrics.json").read_text(encoding="utf-8"))["after"]
    found = json.loads(environment.must("-c", script, artifact, tmp_path))
    assert found == pytest.approx(measured, rel=1e-6)


def test_its_step_works_with_an_observer_of_the_core_in_a_recipe_file(environment, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("""
task: {kind: "toy:toy-regression", width: 16, depth: 1, samples: 2}
quant:
  weights: {bits: 3, granularity: channel, observer: {percentile: {percentile: 99.9}}}
  activations: {granularity: token, dynamic: true}
steps: [{"toy:error-feedback-round": {strength: 0.4, layers: "*.expand"}}, core:round]
""")
    environment.must(QUANTIZE, "--plugin", "toy", "--recipe", recipe, "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["recipe"] == "own"
    assert metrics["after"]["mse"] > 0


def test_what_it_brings_works_in_a_recipe_of_another_plugin(environment, tmp_path):
    """The language-model plugin asks, so that the names come from a plugin that is not the asking one."""
    recipe = tmp_path / "lent.yaml"
    recipe.write_text("""
task: {kind: toy-regression, width: 16, depth: 1, samples: 2}
quant: {weights: {bits: 4, granularity: channel, observer: three-sigma}}
steps: [error-feedback-round]
""")
    output = tmp_path / "out"
    environment.must(QUANTIZE, "--plugin", "llm", "--recipe", recipe, "--output", output)
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8"))["plugin"] == "llm"
    environment.must("-c", f"import ptqcore; ptqcore.load({str(output)!r})")


def test_its_step_without_feedback_gives_the_bytes_of_the_cores_rounding(environment, tmp_path):
    steps = {"own": "steps=[{error-feedback-round: {strength: 0}}]", "core": "steps=[round]"}
    for name, override in steps.items():
        command = (QUANTIZE, "--plugin", "toy", *SMALL, "--set", override, "--output", tmp_path / name)
        environment.must(*command)
    own, core = ((tmp_path / name / "model.safetensors").read_bytes() for name in steps)
    assert own == core


def test_its_model_is_mapped_without_a_run(environment, tmp_path):
    page, data = tmp_path / "map.html", tmp_path / "map.json"
    printed = environment.ptq("map", "--plugin", "toy", *SMALL, "--html", page, "--json", data)
    network = json.loads(data.read_text(encoding="utf-8"))
    blocks = [stage["name"] for stage in network["stages"] if stage["block"]]
    assert blocks
    assert all(f"\n  {block} " in printed for block in blocks)
    assert "Dataflow map" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.html", "map.json"]


# Misused


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps=[{error-feedback-round: {strenth: 1}}]", "strenth' is unknown; did you mean 'strength'?"),
        (
            "steps=[{error-feedback-round: {strength: 2}}]",
            "error-feedback-round.strength' is 2: input should be less",
        ),
        (
            "steps=[eror-feedback-round]",
            "step 'eror-feedback-round' is unknown; did you mean 'error-feedback-round'?",
        ),
        ("quant.weights.observer={three-sigma: {k: 0}}", "three-sigma.k' is 0: input should be greater"),
        ("task.width=two", "recipe key 'task.width' is 'two': input should be a valid integer"),
    ],
)
def test_misuse_is_refused_in_one_sentence(environment, tmp_path, override, sentence):
    output = tmp_path / "out"
    assert sentence in environment.refused("--plugin", "toy", "--set", override, "--output", output)
    assert not output.exists()


def test_a_layer_that_its_step_was_told_to_pass_over_is_not_silently_left(environment, tmp_path):
    override = 'steps=[{error-feedback-round: {layers: "[0-9].*"}}]'
    done = environment.run(
        QUANTIZE, "--plugin", "toy", *SMALL, "--set", override, "--output", tmp_path / "out"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the steps left 2 in full precision")
    assert not (tmp_path / "out" / "model.safetensors").exists()


# Beside a broken neighbour


def test_a_broken_neighbour_is_listed_and_does_not_get_in_the_way(environment, tmp_path):
    site = tmp_path / "site"
    write_distribution(site, "ptq-wreck", "wreck", "raise OSError('libwreck.so.3: cannot open')", "0.4")
    beside = Environment(environment.folder, str(site))
    listed = beside.ptq("plugins").splitlines()
    assert "wreck (ptq-wreck 0.4): BROKEN: OSError: libwreck.so.3: cannot open" in listed
    assert [line for line in listed if line.startswith("toy (ptq-toy 1.2.3): tasks toy-regression")]
    beside.must(QUANTIZE, "--plugin", "toy", *SMALL, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert "plugin 'wreck' (ptq-wreck 0.4) could not be loaded: OSError" in beside.refused(
        "--plugin", "wreck"
    )


# Removed


def test_once_uninstalled_it_is_gone(tmp_path, wheel, artifact):
    environment = new_environment(tmp_path / "env", wheel)
    assert "\ntoy (" in environment.ptq("plugins")
    environment.pip("uninstall", "--quiet", "--yes", "ptq-toy")
    assert "toy" not in environment.ptq("plugins")
    assert environment.refused("--plugin", "toy").startswith("error: plugin 'toy' is not installed")
    done = environment.run("-c", f"import ptqcore; ptqcore.load({str(artifact)!r})")
    assert done.stderr.splitlines()[-1].startswith(
        "ptqcore.errors.PluginError: plugin 'toy' is not installed"
    )


# Right in itself


@pytest.fixture
def toy(monkeypatch):
    """Import a module of the plugin from its sources."""
    monkeypatch.syspath_prepend(TOY)
    yield lambda name: importlib.import_module(f"ptq_toy.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "ptq_toy"]:
        del sys.modules[name]


def test_three_sigma_is_mean_and_standard_deviation_of_each_group(toy):
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(3)) + 0.5
    observer = toy("observer").ThreeSigma(QuantSpec(bits=4, granularity="group", group_size=4), k=2.0)
    observer.update(x)
    low, high = observer.range()
    for index, part in enumerate((x[:, :4], x[:, 4:8], x[:, 8:])):
        mean, std = part.mean(1), part.std(1, correction=0)
        torch.testing.assert_close(low[:, index], (mean - 2 * std).clamp(max=0))
        torch.testing.assert_close(high[:, index], (mean + 2 * std).clamp(min=0))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_merged_three_sigma_observers_give_the_range_of_one_that_saw_everything(toy, granularity):
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(6, size, generator=generator) * size for size in (3, 9, 4)]
    kind, spec = toy("observer").ThreeSigma, QuantSpec(granularity=granularity)
    whole, left, right = kind(spec), kind(spec), kind(spec)
    whole.update(torch.cat(parts, dim=1))
    left.update(parts[0])
    for part in parts[1:]:
        right.update(part)
    left.merge(right)
    left.merge(kind(spec))
    for merged, expected in zip(left.range(), whole.range(), strict=True):
        torch.testing.assert_close(merged, expected)


def test_full_feedback_keeps_the_sum_of_every_row_within_half_a_step(toy):
    """With strength 1 all errors but the last are made up for, as long as the grid does not clip."""
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(5)) - 0.5
    spec = QuantSpec(bits=4, granularity="channel")
    ends = (torch.full((4, 1), -1.0), torch.full((4, 1), 1.0))
    fed = toy("step").round_with_feedback(weight, ends, spec, 1.0)
    rounded = QuantizedTensor.from_range(weight, *ends, spec)
    torch.testing.assert_close(fed.scale, rounded.scale)
    half_a_step = fed.scale[:, 0] / 2 + 1e-5
    drift = (fed.dequantize() - weight).sum(1).abs()
    assert bool((drift <= half_a_step).all())
    assert bool(((rounded.dequantize() - weight).sum(1).abs() > half_a_step).any())
