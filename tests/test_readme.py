"""The README says what is so: its commands parse, its paths exist, its recipe is the shipped one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hfscratch import cli, pipeline, recipe
from tests.conftest import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("hfscratch ")])
def test_every_command_in_the_readme_parses_and_its_recipe_loads(command):
    words = shlex.split(command)[1:]
    arguments = cli._parse(words)
    if getattr(arguments, "recipe", "").startswith("pycode"):
        load(arguments.recipe, *arguments.overrides)


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        if command.startswith("make "):
            assert command.split()[1] in targets, command


def test_the_readme_shows_the_shipped_recipe():
    assert (ROOT / "recipes" / "pycode-tiny.yaml").read_text().strip() in README


def test_the_tree_in_the_readme_is_the_tree():
    tree = README.split("## Where things lie")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = {path.name for path in (ROOT / "hfscratch").iterdir() if path.name[0] not in "_."}
    assert named == package
    for line in tree.splitlines():
        if line and not line.startswith(" "):
            assert (ROOT / line.split()[0]).exists(), line


def test_every_verb_is_in_the_readme():
    for verb in ("run", "init", "generate", *pipeline.STAGES):
        assert f"`hfscratch {verb}" in README


def test_every_shipped_recipe_is_in_the_recipes_readme():
    text = (ROOT / "recipes" / "README.md").read_text()
    for name in recipe.shipped_recipes():
        assert f"`{name}`" in text
