"""The lab: each exercise of experiments/EXERCISES.md has a blank, and tests that grade it."""
import ast
import os
import re
import subprocess
import sys

import pytest
import torch

import flexround
from experiments.exercise import EXERCISES, ROOT, asked, blanked, find

over_exercises = pytest.mark.parametrize("number", EXERCISES)


@over_exercises
def test_a_blank_holds_the_hint_and_not_the_answer(number):
    """A blank is cut out of the source by its name, so a new name has to come here as well."""
    exercise, text = EXERCISES[number], blanked(number)
    source = (ROOT / f"{exercise.module}.py").read_text(encoding="utf-8")
    before, after = ast.parse(source), ast.parse(text)
    assert all(len(line) <= 100 for line in text.splitlines())
    title, hint = asked(number)
    without_marks = " ".join(re.sub(r"^ *# ", "", text, flags=re.M).split())
    assert f"Exercise {number}, {title} {hint} raise NotImplementedError(" in without_marks
    for name in exercise.blanks:
        answer = ast.get_source_segment(source, find(before, name).body[-1])
        assert source.count(answer) == text.count(answer) + 1
        assert isinstance(find(after, name).body[-1], ast.Raise)
    for place in exercise.tests + exercise.bonus:
        file, _, name = place.rpartition("::")
        assert f"def {name}(" in (ROOT / (file or "test_flexround.py")).read_text(encoding="utf-8")
    for name, docstring in exercise.docs.items():
        assert docstring == ast.get_docstring(find(after, name)) != ast.get_docstring(
            find(before, name))


def test_the_regulariser_of_adaround_by_hand():
    """A penalty is 1 for h = 1/2 and 0 for h = 0 or 1. Its gradient moves h to the nearer end."""
    q = flexround.AdaRound(torch.ones(1, 4), 3)
    q.V.data = torch.tensor([[0.0, 9.0, -9.0, -1.0986123]])          # the last: 1 / (1 + 3) = 0.25
    torch.testing.assert_close(q.h().detach(), torch.tensor([[0.5, 1.0, 0.0, 0.2]]))
    for beta in (2.0, 3.0):
        q.V.grad = None
        penalty = q.regulariser(beta)
        assert penalty.shape == ()
        assert float(penalty.detach()) == pytest.approx(1 + 0 + 0 + (1 - 0.6 ** beta))
        penalty.backward()
        assert q.V.grad.sign().tolist() == [[0, 0, 0, 1]]            # descent lowers V


def graded(folder) -> tuple[int, list[str], list[str]]:
    """What the grader says of folder/mine.py: its exit status, the tests that pass and that fail"""
    run = command(folder, "mine.py")
    found = re.findall(r"^(passed|FAILED) .*: (test_\w+)$", run.stdout, re.M)
    assert not run.stderr
    return run.returncode, *([n for word, n in found if word == w] for w in ("passed", "FAILED"))


def command(folder, argument):
    """Run the lab's command in a folder, in a process of its own, because it replaces a module."""
    return subprocess.run([sys.executable, "-m", "experiments.exercise", argument],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder,
                          capture_output=True, text=True)


def test_what_the_lab_refuses(tmp_path):
    """An answer of an hour's work must not be overwritten, and each error says what is allowed."""
    (tmp_path / "mine.py").write_text("precious")
    for argument, message in (
            ("5", "mine.py is there already"), ("11", "a number from 1 to 10 is allowed"),
            ("mine.py", "does not begin with '# Exercise"), ("yours.py", "No such file")):
        run = command(tmp_path, argument)
        assert run.returncode == 1 and message in run.stderr and run.stderr.count("\n") == 1
    assert (tmp_path / "mine.py").read_text() == "precious"


@pytest.mark.slow
@over_exercises
def test_the_tests_of_a_blank_fail_as_written_and_pass_with_the_answer(number, tmp_path):
    """Otherwise a right answer would be refused, or a wrong one accepted."""
    mine, exercise = tmp_path / "mine.py", EXERCISES[number]
    names = [name.split("::")[-1] for name in exercise.tests + exercise.bonus]
    assert command(tmp_path, str(number)).returncode == 0
    assert graded(tmp_path) == (1, [], names)
    source = (ROOT / f"{exercise.module}.py").read_text(encoding="utf-8")
    mine.write_text(f"# Exercise {number}: the reference\n{source}", encoding="utf-8")
    assert graded(tmp_path) == (0, names, [])
    if number == 5:                                                  # a right first answer
        chain = "Clamp.apply(Round.apply(W / S), *self.bounds)"
        mine.write_text(blanked(5).replace("Division.apply(W, S, *self.bounds)", chain))
        assert graded(tmp_path) == (0, names[:-1], names[-1:])
