"""Recipes of strangers on the command line: exit code 2, one sentence, and nothing lost."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptqcore import PtqError
from ptqcore.recipe import read_recipe

GOOD = {
    "name": "good",
    "task": {"kind": "classification"},
    "quant": {"weights": {"bits": 8}},
    "steps": ["round"],
}
BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a]\n" for i in range(9))


def text(**changes: object) -> str:
    return yaml.safe_dump(GOOD | changes)


CORPUS = {
    "empty": ("", "must be a mapping of keys, not NoneType"),
    "list": ("[1, 2]", "must be a mapping of keys, not list"),
    "bytes": (b"\xff\xfe\x00", "cannot be read: "),
    "zero": (b"name: a\x00", "is not valid YAML: "),
    "open": ("name: [", "is not valid YAML: "),
    "bomb": (BOMB, "the alias *a is not read here: write out what it stands for"),
    "itself": ("task: &a {kind: *a}", "the alias *a is not read here"),
    "merge": ("a: &a {b: 1}\nc: {<<: *a}", "the alias *a is not read here"),
    "deep": ("name: " + "[" * 3000, "nested more than 100 deep"),
    "code": ("!!python/object/apply:os.system [exit]", "could not determine a constructor for the tag"),
    "module": ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
    "large": ("#" * (2**17 + 1), "has 131073 bytes, it may have 131072 at most"),
    "date": ("name: 2020-13-45", "is not valid YAML: month must be in 1..12"),
    "keys": (text(**{"task": {1: 2, "kind": "classification"}}), "recipe key 'task"),
    "unhashable": ("? [a]\n: 1", "found unhashable key"),
    "digits": ("name: good\nseed: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
    "hexadecimal": (
        text().replace("name: good", "name: good\nseed: 0x" + "f" * 5000),
        "recipe key 'seed' is a number of thousands of digits",
    ),
    "path": (text(name="../../etc/passwd"), "recipe key 'name' is '../../etc/passwd': "),
    "bits": (text(quant={"weights": {"bits": -4}}), "recipe key 'quant.weights.bits' is -4: "),
    "wide": (text(quant={"weights": {"bits": 10**30}}), "recipe key 'quant.weights.bits' is 1000"),
    "group": (
        text(quant={"weights": {"granularity": "group", "group_size": 0}}),
        "recipe key 'quant.weights.group_size' is 0: ",
    ),
    "memory": (text(memory_gib=float("inf")), "recipe key 'memory_gib' is inf: "),
    "nan": (text(memory_gib=float("nan")), "recipe key 'memory_gib' is nan: "),
    "long": (text(steps="x" * 10**5), "recipe key 'steps' is 'xxx"),
    "model": (
        text(task={"kind": "classification", "model": "os:abort"}),
        "task.model 'os:abort' leads into Python's own library, which holds no network",
    ),
}


@pytest.fixture
def refused(ptq, tmp_path):
    """The sentence of a recipe that `ptq` must refuse, with an artifact that must stay as it is."""

    def refused(content):
        file, output = tmp_path / "recipe.yaml", tmp_path / "out"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        output.mkdir()
        (output / "manifest.json").write_text("an earlier result")
        code, printed, stderr = ptq("quantize", "--plugin", "vision", "--recipe", file, "--output", output)
        assert (code, printed) == (2, "")
        assert [path.name for path in output.iterdir() if path.name != ".work"] == ["manifest.json"]
        assert (output / "manifest.json").read_text() == "an earlier result"
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, stderr
        assert len(lines[0]) < 600
        assert "Traceback" not in stderr
        return lines[0]

    return refused


@pytest.mark.parametrize("name", CORPUS)
def test_a_broken_recipe_is_refused(refused, name):
    content, sentence = CORPUS[name]
    assert sentence in refused(content)


def test_a_recipe_without_an_end_is_refused(ptq, tmp_path):
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    code, _, stderr = ptq("recipe", "show", tmp_path / "endless.yaml", "--plugin", "vision")
    assert (code, "'endless.yaml' is no plain file" in stderr) == (2, True)


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda given: given.encode("utf-8", "surrogatepass"))
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_recipe_or_a_sentence(tmp_path, content):
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    try:
        read_recipe(file)
    except PtqError:
        return


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(["task", "quant", "steps", "seed", "blocks", "evaluate", "export", "x"]), _TREES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_under_a_key_is_read_or_a_sentence(tmp_path, key, value):
    file = tmp_path / "any.yaml"
    file.write_text(yaml.safe_dump(GOOD | {key: value}), encoding="utf-8")
    try:
        read_recipe(file)
    except PtqError:
        return
