"""Language models quantized by two processes of `torchrun`: the bytes of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm

ROOT = Path(__file__).parents[2]
STATIC = [
    "steps=[smoothquant, round]",
    "quant.activations.dynamic=false",
    "quant.activations.granularity=tensor",
]
WEIGHTS = ["quant.weights.group_size=16"]
CASES = {
    "gptq": ["w4a16", *WEIGHTS],  # with asymmetric calibration and clipping
    "awq": ["w8a8"],
    "smoothquant": ["w8a8", *STATIC],
    "os-plus": ["w8a8", *STATIC, "quant.scope=dataflow", "steps=[os-plus, hqq, round, bias-correction]"],
    "reassemble": ["w8a8", "steps=[reassemble, gptq]"],
}
# The command line, once for each list of arguments.
SCRIPT = """
import json, sys
from ptqcore import cli, distributed
for arguments in json.loads(sys.argv.pop()):
    sys.argv = ["ptq", *arguments]
    try:
        cli.app()
    except SystemExit as end:
        if end.code:
            raise
distributed.leave()
"""


def commands(folder, into):
    text = folder / "text.txt"
    sizes = ["task.window=16", "task.calibration_window=16", "task.max_windows=2", "export=[]"]
    given = [f"task.model={folder / 'model'}", f"task.text={text}", f"task.calibration={text}", *sizes]
    for name, (recipe, *changes) in CASES.items():
        yield [
            *("quantize", "--plugin", "llm", "--recipe", recipe, "--output", str(into / name)),
            *(f"--set={change}" for change in ["task.calibration_samples=5", *given, *changes]),
        ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm.save(folder / "model")
    tiny_lm.write_text(folder / "text.txt", 200)
    script = folder / "commands.py"
    script.write_text(SCRIPT)
    for name, launcher in {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node=2"]}.items():
        given = json.dumps(list(commands(folder, folder / name)))
        done = subprocess.run(
            [sys.executable, *launcher, str(script), given],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("artifact") == len(CASES)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_one_process(folders, case):
    one, two = (folder / case for folder in folders)
    assert (two / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    found, wanted = (json.loads((folder / "metrics.json").read_text())["after"] for folder in (two, one))
    assert found == wanted
