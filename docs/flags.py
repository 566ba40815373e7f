"""Write the table of main.py's flags in docs/training.md, and that of patterns in docs/patterns.md.

    python docs/flags.py

Run it after a flag, a default or a help text has changed; a test fails until then.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from masks import MASK_TYPES, TYPES
from training.command_line import build_parser
from training.settings import FLAGS

PATTERNS_PAGE = utils.REPOSITORY / "docs" / "patterns.md"
PATTERNS_START = "<!-- patterns: written by `python docs/flags.py` -->"
PATTERNS_END = "<!-- end of patterns -->"
DOCUMENT = utils.REPOSITORY / "docs" / "training.md"
START = "<!-- flags: written by `python docs/flags.py` -->"
END = "<!-- end of flags -->"
# A default that depends on other flags stands at the end of the help text.
STATED_DEFAULT = re.compile(r" \(default: (.*)\)$")


def make_tables(parser: argparse.ArgumentParser) -> str:
    """One Markdown table per group of `--help`; argparse's own group comes last."""
    own, ours = parser._action_groups[:2], parser._action_groups[2:]
    tables = [make_table(group) for group in [*ours, *own]]
    return "\n\n".join(table for table in tables if table)


def make_table(group) -> str:
    """The group's title and a row per flag; empty for a group without flags."""
    actions = [action for action in group._group_actions if action.dest != "help"]
    if not actions:
        return ""

    rows = [
        f"| {names_of(action)} | {default_of(action)} | {help_of(action)} |" for action in actions
    ]
    title = escape(group.title[0].upper() + group.title[1:])
    return "\n".join([f"**{title}**", "", "| flag | default | meaning |", "|---|---|---|", *rows])


def names_of(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in action.option_strings)


def default_of(action: argparse.Action) -> str:
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    if action.default is not None:
        return f"`{action.default}`"
    stated = STATED_DEFAULT.search(action.help)
    return escape(stated[1]) if stated else "–"


def help_of(action: argparse.Action) -> str:
    text = escape(STATED_DEFAULT.sub("", action.help).replace("%%", "%"))
    if not action.choices:
        return text
    choices = ", ".join(f"`{choice}`" for choice in action.choices)
    return f"{text}; one of {choices}"


def escape(text: str) -> str:
    """Plain text for a cell: nothing in it is taken for Markdown or HTML."""
    return re.sub(r"([*<>|_])", r"\\\1", text)


def make_pattern_table() -> str:
    """A row per mask type: what it is, how many neighbors, and what else changes it."""
    header = "| `--mask_type` | a patch attends to | neighbors, nominal | what changes it |"
    lines = [header, "|---|---|---|---|"]
    for name, mask_type in TYPES.items():
        shown = f"`{name}`" if name in MASK_TYPES else "`--mask_file`"
        takes = [field for field in mask_type.takes if field in FLAGS]
        changes = ", ".join(f"`--{field}`" for field in takes) or "–"
        lines.append(f"| {shown} | {mask_type.about} | {mask_type.formula} | {changes} |")
    return "\n".join(lines)


def write_between(document: Path, start: str, end: str, content: str) -> None:
    text = document.read_text(encoding="utf-8")
    before, after = text.split(start)[0], text.split(end)[1]
    utils.write_text(document, f"{before}{start}\n\n{content}\n\n{end}{after}")
    print(f"wrote {document}")


def tables_in(text: str) -> str:
    """What stands between the two markers."""
    return text.split(START)[1].split(END)[0].strip()


def main(argv=None) -> int:
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(argv)

    write_between(DOCUMENT, START, END, make_tables(build_parser()))
    write_between(PATTERNS_PAGE, PATTERNS_START, PATTERNS_END, make_pattern_table())
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
