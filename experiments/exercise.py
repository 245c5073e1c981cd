"""Write FlexRound yourself, and let the tests grade it. EXERCISES.md has the ten exercises.

    python -m experiments.exercise 5          # writes mine.py: flexround.py with one blank
    python -m experiments.exercise mine.py    # runs the tests of this blank with your mine.py

A blank is cut out of the source by its name, so it is always that of today's flexround.py.
"""
import ast
import importlib.util
import io
import linecache
import os
import re
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Exercise:
    module: str                                              # the file without .py
    blanks: list[str]                                        # whose bodies are taken out
    tests: list[str]                                         # a name alone is in test_flexround.py
    bonus: list[str] = field(default_factory=list)           # of a better answer, reported apart
    docs: dict[str, str] = field(default_factory=dict)       # in place of docstrings that tell it


LOOPS = "test_forward_and_gradients_agree_with_the_loops_in_numpy"
ADAQUANT = "test_gradients_of_adaquant_in_closed_form"
GUARDS = "tests/test_robustness.py::"
DIVIDES = "Rounding by division: W_hat = s1 * round(W / S), Eq. 1 of the paper."

EXERCISES = {
    1: Exercise("flexround", ["Round.backward"],
                ["test_the_straight_through_estimator_of_round", ADAQUANT],
                docs={"Round": "Round to the nearest integer, ties to even."}),
    2: Exercise("flexround", ["Clamp.forward", "Clamp.backward"],
                ["test_the_clipping_mask_of_clamp", ADAQUANT],
                docs={"Clamp": "Clamp to [lo, hi]. The gradient passes inside."}),
    3: Exercise("flexround", ["RoundToNearest.integers"],
                ["test_W_hat_is_s1_times_the_codes",
                 "test_an_asymmetric_range_holds_zero_and_shrinks_each_end_alone",
                 "test_adaround_is_soft_in_train_mode_only_and_rounds_exact_ties_up"]),
    4: Exercise("flexround", ["FlexRound.S"],
                ["test_a_weight_worked_out_by_hand", "test_which_factors_there_are", LOOPS],
                docs={"FlexRound": DIVIDES, "FlexRound.S": "The divisor, W's shape."}),
    5: Exercise("flexround", ["Division.forward", "Division.backward"],
                ["test_proposition_3_1", LOOPS],
                ["test_the_backward_by_hand_is_autograds_in_fewer_operations"],
                {"FlexRound": DIVIDES, "Division": "Return k = clamp(round(W / S), lo, hi)."}),
    6: Exercise("flexround", ["AdaQuant.integers"],
                ["test_a_weight_worked_out_by_hand", ADAQUANT],
                docs={"AdaQuant": "Rounding by addition: W_hat = s1 * round((W + V) / s1)."}),
    7: Exercise("flexround", ["AdaRound.regulariser"],
                ["tests/test_exercise.py::test_the_regulariser_of_adaround_by_hand",
                 GUARDS + "test_the_schedule_of_adaround_is_the_one_that_is_run"],
                docs={"AdaRound.regulariser": "Return how far all h are from 0 or 1, a scalar."}),
    8: Exercise("flexround", ["LSQ.forward"],
                ["test_gradients_of_an_activations_step_size_in_closed_form"],
                [GUARDS + "test_an_activation_is_dropped_in_train_mode_alone_and_may_be_in_half_"
                 "precision"],
                {"LSQ": "Round an activation to a grid with one learned step size."}),
    9: Exercise("reconstruct", ["block_loss"],
                ["test_the_reduction_of_the_loss",
                 GUARDS + "test_the_channels_that_are_asked_for_are_those_that_are_used"]),
    10: Exercise("reconstruct", ["one_pass.for.with"],
                 ["test_each_block_gets_the_quantized_blocks_outputs_and_the_float_networks_targets",
                  "test_a_network_end_to_end", "test_what_each_setting_learns"],
                 docs={"": "Block-by-block reconstruction. Its docstring shows the loop: left out.",
                       "one_pass": "Run once through the blocks, in place. Return their reports."}),
}


def asked(number: int) -> tuple[str, str]:
    """Return the title of an exercise and what it asks, from EXERCISES.md."""
    page = (ROOT / "experiments" / "EXERCISES.md").read_text(encoding="utf-8")
    title, text = re.search(rf"^\*\*{number}\. (.+?)\*\* (.+?)\n\n", page, re.M | re.S).groups()
    return title, " ".join(text.replace("`", "").split())


def find(tree: ast.Module, qualified_name: str):
    """Return a node by its name, such as "Round.backward". A loop's is "one_pass.for"."""
    node = tree
    for name in filter(None, qualified_name.split(".")):
        node = next(child for child in node.body
                    if getattr(child, "name", type(child).__name__.lower()) == name)
    return node


def blanked(number: int) -> str:
    """Return the source of mine.py: the module without the answer to an exercise."""
    exercise, (title, text) = EXERCISES[number], asked(number)
    lines = (ROOT / f"{exercise.module}.py").read_text(encoding="utf-8").splitlines()
    tree, edits = ast.parse("\n".join(lines)), []                    # (first line, end, new lines)
    for name, docstring in exercise.docs.items():
        old = find(tree, name).body[0]
        edits.append((old.lineno - 1, old.end_lineno, f'{" " * old.col_offset}"""{docstring}"""'))
    for name in exercise.blanks:
        first, *others = find(tree, name).body
        if others and isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first = others[0]                                        # after the docstring
        start, end = first.lineno - 1, find(tree, name).body[-1].end_lineno
        while lines[start - 1].strip().startswith("#"):              # a comment can tell it, too
            start -= 1
        indent = " " * first.col_offset
        edits.append((start, end, f'{indent}raise NotImplementedError("{title}: still blank")'))
        if name == exercise.blanks[0]:
            hint = textwrap.fill(f"Exercise {number}, {title} {text}", 99,
                                 initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            edits.append((start, start, hint))
    for start, end, new in sorted(edits, reverse=True):              # from the bottom to the top
        lines[start:end] = new.splitlines()
    head = (f"# Exercise {number}: {exercise.module}.py with a blank. Write your answer where\n"
            "# NotImplementedError is, and run: python -m experiments.exercise mine.py\n")
    return head + "\n".join(lines) + "\n"


class Results:
    """A pytest plugin that keeps what became of each test, and says it in words."""

    def __init__(self):
        self.reports, self.docs, self.broken = {}, {}, []

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(str(report.longrepr))

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.docs[item.originalname] = " ".join(item.function.__doc__.split())

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            name = report.nodeid.split("::")[1].split("[")[0]
            self.reports.setdefault(name, []).append(report)

    def passed(self, name: str) -> bool:
        """Print what became of a test. Return whether it passed in all its cases."""
        reports = self.reports.get(name, [])
        failed = [report for report in reports if not report.passed]
        good = bool(reports) and not failed
        word = "passed" if good else "FAILED"
        print(f"{word} ({len(reports) - len(failed)} of {len(reports)} cases pass): {name}")
        print(textwrap.fill(self.docs.get(name, "It did not run."), 96, initial_indent="    ",
                            subsequent_indent="    "))
        if failed:
            crash = failed[0].longrepr.reprcrash
            line = linecache.getline(crash.path, crash.lineno).strip()
            print(f"    > {Path(crash.path).name}, line {crash.lineno}: {line}")
            said = [line for line in crash.message.splitlines() if line.strip()]
            for line in said[:5]:
                if not line.startswith(" + "):                       # long: how pytest got there
                    print(f"    > {line[:90]}")
        return good


def grade(path: Path) -> bool:
    """Run the tests of an exercise with the module at path. Return whether all but the bonus pass.
    Raises ValueError if the first line of path does not say which exercise it is."""
    import pytest
    first = re.match(r"# Exercise (\d+):", path.read_text(encoding="utf-8"))
    if first is None or int(first[1]) not in EXERCISES:
        raise ValueError(f"{path} does not begin with '# Exercise <a number>:' as mine.py does")
    exercise = EXERCISES[int(first[1])]
    # The tests import the module by its name, and get what sys.modules holds under this name.
    spec = importlib.util.spec_from_file_location(exercise.module, path)
    module = sys.modules[exercise.module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    places = [name if "::" in name else f"test_flexround.py::{name}"
              for name in exercise.tests + exercise.bonus]
    results = Results()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"               # other people's take seconds
    with redirect_stdout(io.StringIO()):                             # we say it in our own words
        pytest.main([f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--tb=native",
                     *(f"{ROOT}/{place}" for place in places)], [results])
    print(f"Exercise {first[1]}, {asked(int(first[1]))[0]}", *results.broken, "", sep="\n")
    names = [place.split("::")[1] for place in places]
    good = [results.passed(name) for name in names[:len(exercise.tests)]]
    print(f"\n{sum(good)} of {len(good)} tests pass.")
    for name in names[len(exercise.tests):]:
        print("\nBonus")
        results.passed(name)
    return all(good)


def main(argument: str) -> None:
    if not argument.isdigit():
        sys.exit(0 if grade(Path(argument)) else 1)
    number, mine = int(argument), Path("mine.py")
    if number not in EXERCISES:
        raise ValueError(f"exercise {number}: a number from 1 to {len(EXERCISES)} is allowed")
    if mine.exists():
        raise ValueError("mine.py is there already. We do not overwrite it: rename or remove it")
    mine.write_text(blanked(number), encoding="utf-8")
    print(f"Exercise {number}, {asked(number)[0]}: mine.py is written. Search NotImplementedError.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.exercise <a number from 1 to 10, or mine.py>")
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as problem:
        sys.exit(f"exercise.py: {problem}")
