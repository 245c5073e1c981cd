"""Guards: the main job's command, the README and the notebook, as committed."""
import importlib
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

import models
import reconstruct
from experiments import instructions
from helpers import ROOT
from reconstruct import ReconstructionConfig, quantize_model

# ---- 1. The main job -----------------------------------------------------------------------------

def python(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def rows_of(output):
    """The first table of an output: {(network, bits): {column: cell}}."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                      for line in output[output.index("|"):].split("\n\n")[0].splitlines())
    return {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}


def test_the_main_job_in_small(capsys):
    """The main job prints one table, with the scores that we find outside its processes."""
    reconstruct.main(["--model", "resnet", "--method", "rtn", "flexround", "--bits", "3",
                      "--iterations", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    scores = {"full precision": None, "RoundToNearest": "rtn", "FlexRound": "flexround"}
    for column, method in scores.items():
        task = models.load_task("resnet", dtype=torch.float64)
        if method:
            config = ReconstructionConfig(method, 3, start="outputs", iterations=2,
                                          batch_size=task.batch_size)
            quantize_model(task.net.blocks, task.calibration, config)
        scores[column] = f"{task.score(task.net):.2f}"
    assert rows_of(printed) == {("resnet", "W3"): scores}
    assert "resnet: 19,642 weights; scikit-learn's digits; accuracy on 597" in printed


def test_a_wrong_command_line_gives_one_line(monkeypatch, capsys):
    """A traceback tells the user of our code, and one line of what to write instead."""
    monkeypatch.setattr(models, "resnet20", lambda path: models.ResNet())    # no download
    for line, message in (
            ("--bits 9", "bits = 9: an integer from 2 to 8 is allowed"),
            ("--lr 0", "lr = 0.0: a positive number"), ("--networks nowhere", "nowhere"),
            ("--method gptq", "method = 'gptq': rtn or adaround"), ("--model resnet20", "--data"),
            ("--model shakespeare", "model = 'shakespeare': resnet, mobilenet, gpt, resnet20 are"),
            ("--model resnet20 --data nowhere", "no data_batch_*.bin in nowhere")):
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "reconstruct.py"), run_name="__main__")
        said = stopped.value.code
        assert said.startswith("reconstruct.py: ") and message in said and "\n" not in said
        assert capsys.readouterr() == ("", "")
    done = python("reconstruct.py", "--bits", "9")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("network, method", [("mobilenet", "flexround"), ("gpt", "adaquant"),
                                             ("resnet", "adaround")])
def test_in_float64_each_instruction_set_finds_the_same_codes(network, method):
    """A reader's processor may be another one than ours, and the README promises our digits."""
    found = {name: instructions.run_under(name, network=network, method=method, samples=128,
                                          iterations=60, batch_size=8)["codes"]
             for name in instructions.sets_here()}
    if len(found) < 2:
        pytest.skip("this processor has one instruction set only")
    assert len(set(found.values())) == 1, found


# ---- 2. README -----------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
# A python block whose next block is a plain one, its output.
EXAMPLES = [pytest.param(code, said, id=str(i))
            for i, ((kind, code), (after, said)) in enumerate(zip(FENCED, FENCED[1:], strict=False))
            if (kind, after) == ("python", "")]


@pytest.mark.slow
def test_the_main_job_as_the_readme_runs_it():
    """The README's first table is what its first command prints, so we print it again."""
    expected = rows_of(README.split("<!-- main -->")[1])
    done = python("reconstruct.py")
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout) == expected                          # to the digit: float64


@pytest.mark.slow
def test_the_rule_of_ones_own_has_the_score_that_the_readme_says():
    """LRQ is the example of an own rule, and its column stands beside the four."""
    done = python("-m", "experiments.lrq")
    assert done.returncode == 0, done.stderr
    said, = re.findall(r"LRQ has (\d+\.\d+)", README)
    assert rows_of(done.stdout)["resnet", "W2"]["LRQ"] == said       # to the digit: float64


@pytest.mark.parametrize("code, said", EXAMPLES)
def test_the_readmes_code_prints_what_it_says(code, said, tmp_path, monkeypatch, capsys):
    """A reader copies these blocks first, so they have to run and print what stands there."""
    (tmp_path / "own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("own.py", run_name="__main__")
    printed = capsys.readouterr().out
    printed = "".join(printed.splitlines(keepends=True)[-said.count("\n"):])
    number = r"\d+\.\d+"                                             # other machines, other digits
    assert re.sub(number, "#", printed) == re.sub(number, "#", said)
    printed, said = (list(map(float, re.findall(number, output))) for output in (printed, said))
    assert printed == pytest.approx(said, rel=0.3, abs=2e-4)


def test_the_readmes_map_names_what_is_there():
    """The map leads from the paper to the code, and a renamed function would break it."""
    rows = README.split("| in the paper | here |")[1].split("\n\n")[0]
    names = [name for name in re.findall(r"`([\w.]+)`", rows)
             if not name.startswith("experiments") and not (ROOT / name).exists()]
    assert sum("." in name for name in names) > 10
    for name in names:
        module, *parts = name.split(".")
        thing = importlib.import_module(module) if parts else None
        for part in parts:
            thing = getattr(thing, part)
        assert parts or name in ReconstructionConfig.__dataclass_fields__, name


def test_the_readmes_links_and_flags_are_there_and_ci_runs_its_commands():
    """A dead link or a flag that is gone tells the reader that nobody looks here."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub("(?ms)^```.*?^```", "", README)):
        assert target.startswith("http") or (ROOT / target).exists(), target
    known = {flag for action in reconstruct.parser()._actions for flag in action.option_strings}
    commands = re.findall(r"^python reconstruct.py.*|^.*&& python reconstruct.py.*", README, re.M)
    assert commands and set(re.findall(r"--[\w-]+", " ".join(commands))) <= known
    for line, after in (("pip install -r requirements.txt", " && python reconstruct.py"),
                        ("python -m pytest", ""),
                        ("jupyter execute demo.ipynb", "")):
        assert f"grep -oE -m1 '^{line}' README.md" in (ROOT / ".ci" / "run").read_text()
        assert re.search(f"^{line}{after}$", README, re.M)


def test_no_page_has_a_blank_that_nobody_filled():
    """XXX stood in a page once, in the place of a number that was still running."""
    pages = [ROOT / "README.md", *(ROOT / "experiments").glob("*.md")]
    assert len(pages) >= 5
    for page in pages:
        assert not re.search(r"XXX|TODO|STEP\d|RULE\d", page.read_text(encoding="utf-8")), page


# ---- 3. The notebook -----------------------------------------------------------------------------

NOTEBOOK = (ROOT / "demo.ipynb").read_text(encoding="utf-8")
CODE = [cell for cell in json.loads(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_whole_run_and_defines_no_algorithm():
    """Its pictures are only evidence if all cells ran in order, and of the code of the modules."""
    assert [c["execution_count"] for c in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for c in CODE for output in c["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    assert len(NOTEBOOK.encode()) < 1.5 * 2 ** 20
    said = json.dumps([o for o in outputs if "image/png" not in o.get("data", {})])
    assert not re.search(r"/(tmp|home|root|work|Users|usr|opt)/|site-packages", said)
    source = "\n".join("".join(c["source"]) for c in CODE)
    assert source and not re.search(r"^\s*class |optim\.|autograd", source, re.M)
    assert max(len(c["source"]) for c in CODE) <= 30                 # lines that fit a screen


def test_no_score_stands_in_the_notebooks_text():
    """Prose rots first. A score belongs to the output of a cell, which a run makes anew."""
    text = "".join(line for c in json.loads(NOTEBOOK)["cells"] if c not in CODE
                   for line in c["source"])
    assert not re.findall(r"\b\d\d\.\d", text)
