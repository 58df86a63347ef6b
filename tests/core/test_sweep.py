"""`ptq sweep`: what it runs, what it refuses before anything runs, and what becomes of each run."""

import json
import sys
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from fake_distribution import write_distribution

from ptqcore import RecipeError, read_sweep
from ptqcore.plugin import discover
from ptqcore.sweeps.job import Outcome, carry_out
from ptqcore.sweeps.runs import make_runs

RECIPE = {"task": {"kind": "small"}, "quant": {"weights": {"bits": 4}}, "steps": ["round"]}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The plugin of this test, installed; recipes `a.yaml` and `b.yaml` in the working folder."""
    write_distribution(tmp_path / "site", "ptq-small", "small", "from sweep_plugin import plugin")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def write(**keys):
    """Write a sweep of the recipes `a` and `b`; None removes a key."""
    data = {"plugin": "small", "recipes": ["a.yaml", "b.yaml"]} | keys
    Path("sweep.yaml").write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return Path("sweep.yaml")


def runs_of(**keys):
    return make_runs(read_sweep(write(**keys)), Path("out"), discover())


# What is run


def test_the_runs_are_the_product_and_each_has_its_own_folder():
    runs = runs_of(models=[{"thin": {"task.width": 4}}, "own"], seeds=[0, 7])
    assert [run.name for run in runs] == [
        f"{recipe}-{model}-s{seed}" for recipe in "ab" for model in ("thin", "own") for seed in (0, 7)
    ]
    assert {run.folder.parent for run in runs} == {Path("out").resolve()}
    assert [run.recipe.task.options["width"] for run in runs] == [4, 4, 8, 8] * 2
    assert [run.recipe.seed for run in runs] == [0, 7] * 4


def test_without_models_and_seeds_runs_are_named_after_recipes():
    assert [run.name for run in runs_of()] == ["a", "b"]


def test_keys_of_a_model_come_after_those_of_all():
    values = {"quant.weights.bits": 3, "task.width": 2, "export": []}
    (first, *_) = runs_of(set=values, models=[{"m": {"task.width": 5}}])
    assert (first.recipe.quant.weights.bits, first.recipe.task.options["width"]) == (3, 5)


def test_values_mean_in_a_sweep_what_they_mean_in_a_recipe():
    (first, *_) = runs_of(set={"description": "no: 1\n...", "steps": [{"nap": {"wrong": ""}}, "round"]})
    assert first.recipe.description == "no: 1\n..."
    assert [step.name for step in first.recipe.steps] == ["nap", "round"]


def test_names_of_folders_are_safe():
    assert runs_of(recipes=["a.yaml"], models=["../org/a model"])[0].name == "a-..-org-a-model"


# What is refused


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"plugin": None}, "sweep key 'plugin' is missing"),
        ({"modles": []}, "sweep key 'modles' is unknown; did you mean 'models'?"),
        ({"recipes": []}, "sweep key 'recipes' is []: "),
        ({"recipes": ["a.yaml", "a.yaml"]}, "sweep key 'recipes' is not possible: 'a.yaml' is there twice"),
        ({"models": ["m", {"m": {}}]}, "sweep key 'models' is not possible: 'm' is there twice"),
        ({"models": ["//"]}, "sweep key 'models' is not possible: folders are named after models"),
        ({"seeds": [-1]}, "sweep key 'seeds.0' is -1: "),
        (
            {"seeds": [1], "set": {"seed": 2}},
            "sweep key 'seeds' is not possible: the recipe key seed is set",
        ),
        ({"seeds": [1], "models": [{"m": {"seed": 2}}]}, "the recipe key seed is set too"),
        ({"plugin": "smal"}, "plugin 'smal' is not installed; did you mean 'small'?"),
        ({"recipes": ["a.yaml", "c.yaml"]}, "recipe 'c.yaml': recipe c.yaml cannot be read"),
        ({"set": {"quant.weights.bts": 3}}, "recipe 'a.yaml': recipe key 'quant.weights.bts' is unknown"),
        (
            {"models": ["own", {"thin": {"task.widht": 3}}]},
            "recipe 'a.yaml' with model 'thin': recipe key 'task.widht' is unknown; did you mean 'width'?",
        ),
        ({"models": [{"m": {"task.kind.x": 1}}]}, "recipe 'a.yaml' with model 'm': "),
        (
            {"models": ["a b", "a-b"]},
            "recipe 'a.yaml' with model 'a b' and recipe 'a.yaml' with model 'a-b' would both be written "
            "to the folder 'a-a-b'",
        ),
        ({"models": ["m", "M"]}, "would both be written to the folder 'a-M'"),
    ],
    ids=str,
)
def test_a_sweep_that_is_not_possible_is_one_sentence_before_anything_runs(ptq, keys, sentence):
    code, out, err = ptq("sweep", write(**keys), "--output", "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", "sweep sweep.yaml must be a mapping of keys, not list"),
        ("a: [", "sweep sweep.yaml is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "sweep sweep.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(text, sentence):
    Path("sweep.yaml").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        read_sweep(Path("sweep.yaml"))


def test_without_ray_there_is_one_sentence_that_says_how_to_get_it(ptq, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = ptq("sweep", write(), "--output", "out")
    assert code == 2
    assert err == "error: ptq sweep needs Ray, which is not installed: pip install 'ptqcore[sweep]'\n"


def test_a_cluster_that_is_not_there_is_one_sentence(ptq):
    pytest.importorskip("ray")
    code, _, err = ptq("sweep", write(), "--output", "out", "--address", "127.0.0.1:1")
    assert code == 2
    assert err.startswith("error: --address '127.0.0.1:1': no Ray cluster can be reached there (")
    assert err.count("\n") == 1


# What becomes of each run


class Here:
    """In the place of a cluster: jobs are run here, one by one, unless `ends` says how one ends."""

    def __init__(self, workers, ends):
        self.workers, self.threads, self.ends, self.started = workers, 1, ends, []
        self.jobs = deque()

    @property
    def running(self):
        return len(self.jobs)

    def start(self, name, job):
        assert self.running < self.workers
        self.started.append(name)
        self.jobs.append((name, job))

    def next_ended(self):
        name, job = self.jobs.popleft()
        return name, self.ends[name].popleft() if self.ends.get(name) else carry_out(job)


@pytest.fixture
def here(monkeypatch):
    """Sweep without Ray, `ends` as of `Here`: gives what was started."""

    def use(**ends):
        cluster = Here(2, {name: deque(each) for name, each in ends.items()})

        @contextmanager
        def connected(address, workers, runs):
            yield cluster

        monkeypatch.setattr("ptqcore.sweeps.sweep.connected", connected)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return cluster.started

    return use


def table():
    return {row["name"]: row for row in json.loads(Path("out/sweep.json").read_text())}


def test_every_run_is_an_artifact_and_a_row_of_the_table(ptq, here):
    here()
    code, out, _ = ptq("sweep", write(seeds=[0, 1]), "--output", "out")
    assert code == 0
    assert [row["state"] for row in table().values()] == ["done"] * 4
    for name, row in table().items():
        assert row["metrics"] == json.loads(Path("out", name, "metrics.json").read_text())
        assert (Path("out") / name / "run.log").is_file()
    assert out.startswith("| recipe | seed | state | sum before | sum after | ")
    assert Path("out/sweep.md").read_text() in out
    first = Path("out/sweep.csv").read_text().splitlines()[1].split(",")
    assert first[:3] == ["a", "0", "done"]
    assert float(first[4]) == table()["a-s0"]["metrics"]["after"]["sum"]
    assert "4 runs: 4 done" in Path("out/sweep.html").read_text()


def test_a_run_whose_process_dies_is_gone_on_with_up_to_a_limit(ptq, here):
    started = here(a=[None, None], b=[None] * 3)
    code, _, err = ptq("sweep", write(), "--output", "out", "--retries", "2")
    assert code == 1
    assert sorted(started) == ["a"] * 3 + ["b"] * 3
    assert table()["a"]["state"] == "done"
    assert table()["b"]["reason"].startswith("its worker process died 3 times")
    assert (
        "sweep: a: its worker process died, it goes on behind its last finished block (retry 2 of 2)" in err
    )
    assert err.splitlines()[-1].startswith("error: 1 of 2 runs did not succeed")


def test_a_run_with_wrong_input_is_not_repeated_and_stops_no_other(ptq, here):
    started = here(a=[Outcome(reason="the data are wrong", refused=True)])
    code, out, err = ptq("sweep", write(), "--output", "out")
    assert code == 2
    assert started == ["a", "b"]
    assert [row["state"] for row in table().values()] == ["refused", "done"]
    assert "the data are wrong" in out
    assert "the data are wrong" in err


def test_a_bug_of_a_plugin_is_a_reason_with_its_traceback_in_the_folder_of_the_run(ptq, here):
    here()
    keys = {"models": ["good", {"bad": {"steps": [{"nap": {"wrong": "oh no"}}, "round"]}}]}
    code, _, _ = ptq("sweep", write(recipes=["a.yaml"], **keys), "--output", "out")
    assert code == 1
    assert [row["state"] for row in table().values()] == ["done", "failed"]
    reason = table()["a-bad"]["reason"]
    assert reason.startswith("step 'nap' of plugin 'small' failed in block '0': RuntimeError: oh no (its ")
    assert "oh no" in Path("out/a-bad/.work/traceback.txt").read_text()


def test_resume_keeps_what_the_same_recipe_made_and_is_whole(ptq, here):
    here()
    everything = {"models": [{"m": {"task.width": 4}}, {"n": {"task.width": 4}}]}
    assert ptq("sweep", write(**everything), "--output", "out")[0] == 0
    before = table()
    Path("out/a-m/model.safetensors").write_bytes(b"damaged")
    Path("out/b-m/metrics.json").unlink()
    everything["models"][1]["n"]["task.width"] = 6
    started = here()
    code, _, err = ptq("sweep", write(**everything), "--output", "out", "--resume")
    assert code == 0
    assert started == ["a-m", "a-n", "b-m", "b-n"]
    assert table()["a-m"]["metrics"]["after"] == before["a-m"]["metrics"]["after"]
    assert table()["a-n"]["metrics"]["after"] != before["a-n"]["metrics"]["after"]
    started = here()
    code, _, err = ptq("sweep", write(**everything), "--output", "out", "--resume")
    assert (code, started) == (0, [])
    assert "sweep: 4 of 4 runs are finished already" in err
    assert [row["state"] for row in table().values()] == ["done"] * 4


def test_without_resume_everything_is_run_again(ptq, here):
    here()
    ptq("sweep", write(), "--output", "out")
    started = here()
    ptq("sweep", write(), "--output", "out")
    assert started == ["a", "b"]


def test_an_interrupted_sweep_says_how_to_go_on_and_has_its_table(ptq, here, monkeypatch):
    class Interrupted(deque):
        def popleft(self):
            raise KeyboardInterrupt

    here(b=[None])
    monkeypatch.setattr("ptqcore.sweeps.sweep._Tasks._died", lambda *_: Interrupted().popleft())
    code, _, err = ptq("sweep", write(), "--output", "out")
    assert code == 130
    assert err.endswith("interrupted; run the same command with --resume to go on\n")
    assert [row["state"] for row in table().values()] == ["done", "waiting"]
