"""Make the pages of the site that the code writes: mkdocs calls this while it builds.

    README.md, CONTRIBUTING.md          index.md, contributing.md
    <!-- commands --> on a page         every command, its arguments and its options
    <!-- names -->                      families, schemes, engines, devices
    <!-- errors -->                     the tree that vlmedge/errors.py opens with
    <!-- returned -->                   the classes that methods of the API return
    <!-- capfilt -->, <!-- steps -->    the built-in composition, and every kind of step
    <!-- unique -->                     the source of the shortest step

Nothing of it is kept in git: a page cannot say what the code no longer does.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
MARK = re.compile(r"^<!-- (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository."""
    for source, target in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, page in COPIES.items():
            text = text.replace(f"]({name})", f"]({page})")
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says in the place of each mark."""
    return MARK.sub(lambda found: MADE[found[1]](), markdown)


def commands() -> str:
    """Describe every command as the command line itself knows it."""
    from vlmedge.cli.app import app

    return "\n".join(_described("vlmedge", typer.main.get_command(app)))


def _described(name: str, command: Any) -> Iterator[str]:
    """Yield the lines about a command, or about each command of a group."""
    for child in getattr(command, "commands", {}).values():
        yield from _described(f"{name} {child.name}", child)
    if hasattr(command, "commands"):
        return
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    yield from (f"## {name}", "", command.help, "", "```text", usage, "```", "")
    yield from ("| argument or option | meaning |", "| --- | --- |")
    for param in command.params:
        yield f"| {_spelled(param)} | {_meaning(param)} |"
    yield ""


def _spelled(param: Any) -> str:
    """Return how a parameter is typed."""
    metavar = param.metavar or ""
    if param.param_type_name == "argument":
        return f"`{metavar}`"
    text = f"{', '.join(param.opts)} {metavar}".strip()
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"  # | would end the cell


def _meaning(param: Any) -> str:
    """Return a parameter's help with its default."""
    text = (param.help or "").replace("|", "\\|")
    if isinstance(param.show_default, str):
        return f"{text} Default: {param.show_default}."
    if param.default in (None, False, "") or param.param_type_name == "argument":
        return text
    return f"{text} Default: `{param.default}`."


def names() -> str:
    """List what the shelves hold, as `vlmedge list` does."""
    from vlmedge.shelves.registry import DEVICES, FAMILIES, SCHEMES

    lines = ["## Families", "", "| family | architectures | aliases |", "| --- | --- | --- |"]
    for family in FAMILIES.names():
        architectures = "<br>".join(FAMILIES.literal(family, "ARCHITECTURES"))
        pairs = FAMILIES.literal(family, "ALIASES").items()
        aliases = "<br>".join(f"`{alias}` = {hub}" for alias, hub in pairs)
        lines.append(f"| {family} | {architectures} | {aliases} |")
    lines += ["", "## Schemes", "", "| scheme | file |", "| --- | --- |"]
    lines += [f"| `{scheme}` | `quantize/{scheme}.py` |" for scheme in SCHEMES.names()]
    lines += [
        "",
        "## Devices",
        "",
        "| device | title | memory, GiB | GB/s | engines | computes in |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for line in DEVICES.names():
        for name, device in DEVICES[line].items():
            cells = [f"`{name}`", device.title, f"{device.memory_gib or ''}"]
            cells += [f"{device.bandwidth_gb_s:g}", ", ".join(device.engines)]
            lines.append(f"| {' | '.join([*cells, ', '.join(device.precisions)])} |")
    return "\n".join(lines)


def errors() -> str:
    """Show the tree of errors."""
    import vlmedge.errors

    return f"```text\n{vlmedge.errors.__doc__}```"


def returned() -> str:
    """Point mkdocstrings at the classes that the public methods return."""
    import vlmedge

    makers = (vlmedge.Model.session, vlmedge.Model.chat, vlmedge.Model.index, vlmedge.compose)
    classes = [get_type_hints(maker)["return"] for maker in makers]
    return "\n\n".join(f"::: {each.__module__}.{each.__qualname__}" for each in classes)


def capfilt() -> str:
    """Show the built-in composition."""
    text = (ROOT / "vlmedge" / "compositions" / "capfilt.json").read_text(encoding="utf-8")
    return f"```json\n{text}```"


def steps() -> str:
    """List each kind of step with its words."""
    from vlmedge.compositions.steps import KINDS

    lines = ["| task | does | words beside `name` and `inputs` |", "| --- | --- | --- |"]
    for task, kind in KINDS.items():
        words = [f"`{word}`" for word in kind.__struct_fields__ if word not in ("name", "inputs")]
        lines.append(f"| `{task}` | {str(kind.__doc__).splitlines()[0]} | {', '.join(words)} |")
    return "\n".join(lines)


def unique() -> str:
    """Show the class of a step."""
    from vlmedge.compositions.steps import KINDS

    return f"```python\n{inspect.getsource(KINDS['unique'])}```"


MADE: dict[str, Callable[[], str]] = {
    "commands": commands,
    "names": names,
    "errors": errors,
    "returned": returned,
    "capfilt": capfilt,
    "steps": steps,
    "unique": unique,
}
