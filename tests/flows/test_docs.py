"""What README, CONTRIBUTING and the pages of docs/ name exists: commands, options, files, links.

Blocks marked `bash` and `python` in docs/guide run as they stand (`pytest -m slow`); those marked
`sh` need the hub, a GPU or a board.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from vlmedge.cli.app import app
from vlmedge.make.recipe import read_recipe
from vlmedge.spec.manifest import FORMAT, Manifest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
GENERATED = {"index.md", "contributing.md"}  # by docs/generate.py
SCRIPTS = {
    "families": "families_table",
    "fullsize": "fullsize",
    "plan_memory": "plan_memory",
    "tensorrt_lint": "lint_table",
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
TREE = re.compile(
    r"(?:vlmedge|export|quantize|runtimes|devices|benchmarks|tests|docs|examples)/\S+"
)
INSIDE = re.compile(r"(?:\w+/)+\w+\.py")  # of the core, as the architecture draws it
EXAMPLE = re.compile(r"/(x|metaclip2)\.py|[<>*]")  # a file that the reader makes
OWN = re.compile(r"--[a-z][a-z0-9-]*")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of some languages."""
    return [text for language, text in FENCED.findall(page.read_text()) if language in languages]


def spans(page: Path) -> list[str]:
    """Return what stands between backquotes in a page's text, outside of blocks."""
    return INLINE.findall(FENCED.sub("", page.read_text()))


def lines(page: Path) -> Iterator[str]:
    """Yield every line of a page that calls vlmedge, in blocks and in the text."""
    for text in [*blocks(page, "", "sh", "bash", "text"), *spans(page)]:
        for line in text.splitlines():
            if line.startswith("vlmedge ") and "(" not in line.split("#")[0]:
                yield line


def find(words: list[str]) -> Any:
    """Return the click command that words call, or none where they show no one command."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        if word.isupper() or word.startswith("-"):
            return None
        assert word in command.commands, f"there is no command {word!r}"
        command = command.commands[word]
    return command


def options(command: Any) -> set[str]:
    found = {text for param in command.params for text in (*param.opts, *param.secondary_opts)}
    return {text for text in found if text.startswith("-")} | {"--help"}


def every_option(command: Any) -> set[str]:
    children = getattr(command, "commands", {}).values()
    return options(command).union(*(every_option(child) for child in children))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in lines(page):
        words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
        command = find(words)
        if command is not None and "..." not in words[:1]:
            given = {word.partition("=")[0] for word in words if OWN.match(word)}
            assert given <= options(command), line


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "results"], ids=named)
def test_options_that_stand_alone_are_some_commands(page: Path) -> None:
    known = every_option(typer.main.get_command(app))
    for span in spans(page):
        if span.startswith("--"):
            assert set(OWN.findall(span)) <= known, span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_exist(page: Path) -> None:
    drawn = [word for text in blocks(page, "text") for word in text.split()]
    for span in (span for span in [*spans(page), *drawn] if not EXAMPLE.search(span)):
        if TREE.fullmatch(span):
            assert (ROOT / span).exists(), span
        elif INSIDE.fullmatch(span):
            assert (ROOT / "vlmedge" / span).exists(), span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" not in target:
            made = Path(target).name in GENERATED and page.parent != ROOT
            assert made or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", SCRIPTS)
def test_generated_results_say_so(page: str) -> None:
    script = f"benchmarks/{SCRIPTS[page]}.py"
    for file in (ROOT / "docs" / "results" / f"{page}.md", ROOT / script):
        assert re.search(
            rf"Generated by `python {script}[^`]*`[^:]*: do not edit", file.read_text()
        )


@pytest.mark.skipif(FORMAT < 2, reason="the page shows format 2")
def test_manifest_on_the_page_is_one() -> None:
    [text] = blocks(ROOT / "docs" / "reference" / "bundle.md", "json")
    assert msgspec.json.decode(text, type=Manifest).format == FORMAT


def test_recipe_on_the_page_is_one(tmp_path: Path) -> None:
    [text] = blocks(ROOT / "docs" / "reference" / "recipe.md", "json")
    (tmp_path / "recipe.json").write_text(text)
    assert read_recipe(tmp_path / "recipe.json").chosen().blocks == (32,)  # type: ignore[attr-defined]


def test_ci_finds_the_two_lines_that_set_up() -> None:
    found = re.findall(r"^pip install -e .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert found == [
        "pip install -e '.[export]' && vlmedge demo",
        "pip install -e '.[dev]' && pytest",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in which the guides are read: `vlmedge demo` has run there."""
    folder = tmp_path_factory.mktemp("guides")
    run(folder, "bash", "-c", "vlmedge demo")
    return folder


def run(folder: Path, *command: str) -> None:
    """Run a command with this environment's programs before all others."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PATH": path})


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_guide_runs_as_it_stands(page: Path, place: Path) -> None:
    for text in blocks(page, "bash"):
        run(place, "bash", "-euo", "pipefail", "-c", text)
    shown = [text for text in blocks(page, "python") if not text.startswith("# needs")]
    run(place, sys.executable, "-c", "\n".join(shown))


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
