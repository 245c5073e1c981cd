"""The lab: each exercise of experiments/EXERCISES.md has a blank, and its tests grade what is in it."""
import ast
import re
import subprocess
import sys

import pytest
import torch

import flexround
from experiments.exercise import EXERCISES, ROOT, asked, blanked

over_exercises = pytest.mark.parametrize("number", EXERCISES)


@over_exercises
def test_the_source_of_an_exercise_has_a_blank_and_not_the_answer(number):
    """A blank is cut by name. It has to follow the source, and the hint has to stand in it."""
    text, source = blanked(number), (ROOT / f"{EXERCISES[number].module}.py").read_text()
    ast.parse(text)
    assert text.startswith(f"# Exercise {number}: ")
    title, hint = asked(number)
    in_comments = " ".join(re.sub(r"^ *# ", "", text, flags=re.M).split())
    assert f"Exercise {number}, {title} {hint}" in in_comments
    assert text.count("raise NotImplementedError") == len(EXERCISES[number].blanks)
    assert all(len(line) <= 100 for line in text.splitlines())
    for name in EXERCISES[number].blanks:                            # the answer is in no line of it
        answer = ast.get_source_segment(source, reference(source, name)[-1]).strip()
        assert answer in source and source.count(answer) - text.count(answer) == 1
    for name in EXERCISES[number].docs:
        assert ast.get_docstring(node(source, name)) != ast.get_docstring(node(text, name))
