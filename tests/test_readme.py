"""Every README: links lead somewhere, commands are ones that the tools take, examples run, numbers are the CSVs'.

    python -m tests.test_readme

brings the line numbers in links such as ``units.py#L30`` up to date.
"""

from __future__ import annotations

import argparse
import ast
import csv
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import framework
from framework.analysis.results_text import up_to_date
from framework.config import loading, methods
from framework.data.splits import Splits
from framework.local import methods as local_methods
from framework.model import recipe_network

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
READMES = [README, *sorted(path for folder in ("framework", "recipes", "slurm", "tests", "tools")
                           for path in (ROOT / folder).rglob("README.md"))]  # fmt: skip
DOCUMENTED = [ROOT / "framework" / "train.py", *sorted((ROOT / "tools").glob("*.py"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
PROGRAMS = ("uv", "pip", "python", "deepspeed", "torchrun", "sbatch", "pytest")
# With one argument each.
SBATCH = {
    "--partition",
    "--account",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--dependency",
    "--job-name",
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    """From the root of the repository."""
    return str(path.relative_to(ROOT))


def block(readme: Path, language: str, mark: str) -> str:
    """The one fenced block of a README in that language that contains ``mark``."""
    (code,) = [text for kind, text in BLOCK.findall(readme.read_text()) if kind == language and mark in text]
    return code


# Commands


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command that a README, or the docstring of a tool, shows."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
    else:
        text = BLOCK.sub(
            lambda found: "" if found[1] else re.sub("^", "    ", found[2], flags=re.M), path.read_text()
        )
    text = re.sub(r"\\\n\s*", "", text)
    for line in text.splitlines():
        shown = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for code in shown:
            yield from split(code) if code.split()[:1] else ()


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without assignments, ``uv run`` and the brackets and dots of a usage text."""
    line = re.sub(r"(?<=\S) {3,}.*", "", line)  # what a usage text says about the command
    try:
        lexer = shlex.shlex(
            re.sub(r"(?<!\S)\[([^\[\]]*)\](?!\S)", r"\1", line), posix=True, punctuation_chars=";&"
        )
        lexer.whitespace_split = True
        words = [*lexer, ";"]
    except ValueError:  # a quote that is an apostrophe: prose
        return
    command: list[str] = []
    for word in words:
        if set(word) <= set(";&"):
            while command and (re.fullmatch(r"[A-Z]+=.*", command[0]) or command[0] in ("do", "nice")):
                command.pop(0)
            if command[:2] == ["uv", "run"]:
                command = command[2:]
            if len(command) > 1 and command[0] in PROGRAMS:
                yield command
            command = []
        elif word != "...":
            command.append(word.removesuffix("...").split("|")[0])


COMMANDS = {
    f"{name(path)}: {shlex.join(command)}": command
    for path in (*READMES, *DOCUMENTED)
    for command in commands(path)
}


class Parsed(BaseException):
    """A tool has taken its arguments, and would begin to work."""


def stop_after(parse: Callable[..., object]) -> Callable[..., None]:
    """The parser's method, and then an end."""

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)
        raise Parsed

    return parse_and_stop


@pytest.fixture
def triples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of one's own, among ours."""
    folder = shutil.copytree(methods.FOLDER, tmp_path / "methods")
    (folder / "triples.py").write_text(block(README, "python", "def plan"))
    monkeypatch.setattr(methods, "FOLDER", folder)
    monkeypatch.setattr(local_methods, "__path__", [*local_methods.__path__, str(folder)])


@pytest.mark.parametrize("shown", COMMANDS, ids=list(COMMANDS))
def test_a_command_is_one_that_works(shown: str, triples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts, recipes, extras and marks exist, and options are ones that the tools take; placeholders are capitals."""
    monkeypatch.chdir(ROOT)
    program, *words = COMMANDS[shown]
    if program == "pytest":
        marks = {mark.split(":")[0] for mark in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
        expressions = [word for option, word in pairwise(words) if option == "-m"]
        assert set(re.findall(r"\w+", " ".join(expressions))) - {"and", "or", "not"} <= marks
        assert all(Path(word.split("::")[0]).exists() for word in words if word.startswith("tests/"))
    elif program in ("uv", "pip"):
        extras = {extra for word in words for extra in re.findall(r"^(?:\.|stagewise)\[(.*)\]$", word)}
        extras |= {word for option, word in pairwise(words) if option == "--extra"}
        assert {part for extra in extras for part in extra.split(",")} <= set(
            PYPROJECT["project"]["optional-dependencies"]
        )
    elif program == "sbatch":
        while words[0].startswith("-"):
            assert words[0].split("=")[0] in SBATCH
            words = words[1:] if "=" in words[0] else words[2:]
        submitted(Path(words[0]), words[1:])
    elif "-m" in words[:1]:
        assert Path(*words[1].split(".")).with_suffix(".py").is_file()
    else:
        while words and not words[0].endswith(".py"):
            words = words[2:] if words[0].startswith("--num") else words[1:]
        if words:
            started(Path(words[0]), words[1:], monkeypatch)


def started(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that script takes these words."""
    assert script.is_file()
    recipes = [word for word in words if word.startswith("recipes/") and word.endswith(".yaml")]
    assert all(Path(recipe).is_file() for recipe in recipes)
    if script.name == "train_detectron2.py":  # its parser is Detectron2's
        return
    if recipes and script.name in ("train.py", "show_plan.py", "memory_report.py"):
        loading.load([recipes[0], *(overrides(words) or ["data.path=unused"])])
    if script.name != "train.py":
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(ROOT / "tools"))
            for method in ("parse_args", "parse_intermixed_args"):
                parse = getattr(argparse.ArgumentParser, method)
                patch.setattr(argparse.ArgumentParser, method, stop_after(parse))
            patch.setattr(sys, "argv", [str(script), *words])
            with pytest.raises(Parsed):
                runpy.run_path(str(script), run_name="__main__")


def overrides(words: list[str]) -> list[str]:
    """Those of a recipe's keys among the words of a command."""
    return [word for word in words if re.match(r"[\w.]+=", word) and word != "key=value"]


def submitted(script: Path, words: list[str]) -> None:
    """Whether a job script takes these words, and what it starts exists."""
    text = script.read_text()
    assert "#SBATCH" in text and subprocess.run(["bash", "-n", str(script)]).returncode == 0
    found = re.findall(r"(?:recipes|slurm|tools|framework)/[\w/]+\.(?:yaml|sh|py)", text)
    assert found and all(Path(path).is_file() for path in found)
    recipes = words[:1] if script.name == "train.sh" else [p for p in found if p.startswith("recipes/")]
    if "train.sh" in text + script.name and recipes != ["RECIPE"]:
        loading.load([*recipes, *overrides(words)])


def test_commands_are_found() -> None:
    """Of every kind: in a paragraph, behind variables, over two lines, in a table, in a docstring."""
    assert len(COMMANDS) > 60
    assert list(split("A=b uv run python x.py --y && pip install z")) == [
        ["python", "x.py", "--y"],
        ["pip", "install", "z"],
    ]
    assert list(split("    python tools/a.py RUN [RUN ...] [-o report.html] [key=value ...] a=[1,2]")) == [
        ["python", "tools/a.py", "RUN", "RUN", "-o", "report.html", "key=value", "a=[1,2]"]
    ]


@pytest.mark.parametrize("words", (["recipes/quickstart.yaml", "--pngg", "a"], ["recipes/no.yaml"]))
def test_a_wrong_option_or_recipe_would_be_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, Exception)):
        started(Path("tools/show_plan.py"), words, monkeypatch)


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_a_job_script_starts_what_exists(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if script.stem != "common":
        submitted(script, ["RECIPE"])


# Links


LINKS = [(path, text, target) for path in READMES for text, target in LINK.findall(path.read_text())]
LINES = [(path, text, target) for path, text, target in LINKS if re.search(r"#L\d+$", target)]


def headings(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a README."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READMES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for _, target in (link[1:] for link in LINKS if link[0] == path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if file.startswith(("http:", "https:")):
            continue
        if (
            not there.exists()
            or ROOT not in there.parents
            or (anchor and there.suffix == ".md" and anchor not in headings(there))
        ):
            broken.append(target)
    assert not broken


def numbered(path: Path, text: str, target: str) -> int:
    """The line of what the link's text names, in its file: the definition, or else the first mention."""
    file, named = (path.parent / target.partition("#")[0]).resolve(), re.escape(text.strip("`"))
    lines = file.read_text().splitlines()
    for pattern in (rf"(def |class )?{named}\b", rf"(def |class )?{named}", rf".*{named}"):
        for number, line in enumerate(lines, 1):
            if re.match(pattern, line.strip()):
                return number
    raise AssertionError(f"{name(path)}: no line of {name(file)} has {text}")


def test_links_to_a_line_lead_to_the_definition_they_name() -> None:
    wrong = [f"{target}: line {line}" for path, text, target in LINES
             if not target.endswith(f"#L{(line := numbered(path, text, target))}")]  # fmt: skip
    assert LINES and not wrong, "python -m tests.test_readme mends them"


def renumber() -> None:
    """Bring the numbers of such links up to date."""
    for path, text, target in LINES:
        old, new = (
            f"[{text}]({target})",
            f"[{text}]({target.partition('#')[0]}#L{numbered(path, text, target)})",
        )
        path.write_text(path.read_text().replace(old, new))


# What the README says


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_plain_pytorch_example(capsys: pytest.CaptureFixture[str]) -> None:
    code = compile(block(README, "python", "optimizer.step()"), str(README), "exec")
    printed = []
    for _ in range(2):
        exec(code, {})
        printed.append([ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()])
    assert [list(losses) for losses in printed[0]] == [["layer2", "layer3", "layer4"]] * 3
    for losses in printed[0]:
        # 16 random embeddings against 14 negatives: chance is log 15.
        assert all(1.5 < loss < 4.5 for loss in losses.values())
    assert printed[0] == printed[1]


def test_the_method_of_ones_own(tmp_path: Path, triples: None) -> None:
    """As the README's file, under the README's overrides, for 40 steps on digits."""
    (command,) = [
        words for shown, words in COMMANDS.items() if "show_plan.py" in shown and "triples" in shown
    ]
    recipe = loading.load([str(ROOT / command[2]), *command[3:], f"data.path={tmp_path / 'digits'}"])
    splits = Splits.open(recipe)
    net = recipe_network(recipe, splits.num_classes)
    windows = [(unit.first, unit.last) for unit in net.plan.units]
    assert windows == [(max(0, last - 2), last) for last in range(net.plan.segments)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for (batch,) in splits.train_loader(net.plan.views).steps(0, 40):
        output = net(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.unit_losses)
    first, last = torch.stack(losses[:5]).mean(0), torch.stack(losses[-5:]).mean(0)
    assert (last < 0.7 * first).all()
    assert abs(losses[0].mean() - math.log(10)) < 0.8  # what guessing costs


def test_the_recipe_of_ones_own(tmp_path: Path) -> None:
    """The example of recipes/README.md, beside ours: a network with a unit for each segment."""
    shutil.copytree(ROOT / "recipes" / "base", tmp_path / "base")
    (tmp_path / "mine.yaml").write_text(block(ROOT / "recipes" / "README.md", "yaml", "defaults:"))
    recipe = loading.load([str(tmp_path / "mine.yaml")])
    assert (recipe.views.kind, recipe.data.path, recipe.train.precision) == (
        "supervised",
        "/data/photos",
        "bf16",
    )
    plan = recipe_network(recipe, recipe.data.num_classes or 0).plan
    assert [(unit.first, unit.last) for unit in plan.units] == [(s, s) for s in range(plan.segments)]
    assert plan.segments == 4


def test_the_table_of_results_is_the_csvs() -> None:
    """Times, activations and errors of the methods on ResNet-32."""
    results = ROOT / "recipes" / "results"
    for path in (README, results / "README.md"):
        assert up_to_date(path.read_text(), results) == path.read_text(), "python tools/results_text.py"
    (text,) = re.findall(r"^\| method \| time / BP.*?\n\n", README.read_text(), re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.strip().splitlines()[2:]]
    table = {method.split()[0]: cells for method, *cells in rows}
    with open(results / "step_cpu_resnet32_k16_b64.csv") as file:
        steps = {row["method"]: row for row in csv.DictReader(file)}
    with open(results / "cifar10_r32_n5000_4ep_b64-amd-epyc.csv") as file:
        errors = {row["row"].split()[0]: row for row in csv.DictReader(file) if row["seed"] == "0"}
    assert set(table) == {"BP", "DGL", "InfoPro", "MLM", "LAM", "MLAAN", "DGL*"}
    for method, (time, repeated, activations, seeds, error, paper) in table.items():
        assert float(error) == float(errors[method]["error"]) and seeds == "1"
        assert paper == errors[method]["paper_error"]
        if method.lower() in steps:
            step = steps[method.lower()]
            shown = [step[key] for key in ("ratio_time", "ratio_time_naive", "ratio_peak_activations")]
            assert [time, repeated, activations] == [f"{float(number):.2f}" for number in shown]


def test_the_rooms_are_those_of_the_package() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "framework" / "README.md").read_text(), re.MULTILINE)
    assert listed == re.findall(r"^\* ``(\w+)``", framework.__doc__ or "", re.MULTILINE)


if __name__ == "__main__":
    renumber()
