"""What ``gputune.tune`` says, in the words of the command line: arguments by their options."""

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from gputune.cli.arguments import option_groups

_PHRASES = {
    **{
        f"{before} pass X{end}": f"{before} write the file again with X{end}"
        for before, end in (
            ("after the rows:", "[:, None]"),
            ("want them first:", "."),
            ("; or", ".reshape("),
        )
    },
    "Give this search a path of its own": "Give this search a folder of its own, --out OTHER",
    "give this search a path of its own": "give this search a folder of its own, --out OTHER",
    "repeat the first call's arguments": "repeat the first command's options",
    "differs from this call in": "differs from this command in",
    "the same call goes on from there where study= names a file": "the same command goes on from there",
    "folds (cv, groups)": "folds (--cv, --groups)",
    "with gputune.Study.open": "with gputune trials",
}


def flags() -> dict[str, str]:
    """Return the option of ``gputune tune`` for each argument of ``gputune.tune``, and of a method, that has one."""
    known = {name: rule.name for _, group in option_groups() for name, rule in group.items()}
    return {**known, "verbose": "--quiet"}


def in_flags(text: str, *, kept: Collection[str] = ()) -> str:
    """Return what ``gputune.tune`` says in the words of the command line: arguments, but those ``kept``, as options."""
    known = flags()
    names = "|".join(name for name in known if name not in kept)
    before, change, after = text.partition("differs from this call in: ")
    if change:
        differing, end, remedy = after.partition(". Give this search")
        differing = re.sub(rf"(?:^|(?<=, ))({names})\b(?= \(|, |$)", lambda match: known[match[1]], differing)
        text = f"{before}{change}{differing}{end}{remedy}"
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    text = re.sub(
        r"\b(?:Halving|Median|Hypergradient)\((\w+)=\.\.\.\)",
        lambda match: known.get(match[1], match[0]),
        text,
    )
    text = re.sub(r"\bspace\['(\w+)'\]", r"--space \1", text)
    value = r"""'[^']*'|"[^"]*"|\([^()]*\)|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?\b|True|False|None|(?=[\s.,;:)]|$)"""
    text = re.sub(rf"(?<![\w'\"./-])({names})=({value})", lambda match: _option(known, *match.groups()), text)
    verbs = "must|is|are|for|has|needs|cannot|would|with|and"
    text = re.sub(rf"^({names})\b(?=:| (?:{verbs})\b)", lambda match: known[match[1]], text)
    alone = "|".join(name for name in names.split("|") if "_" in name)
    return re.sub(rf"(?<![\w'\"./-])({alone})\b(?!['\"/(=])", lambda match: known[match[1]], text)


def _option(known: dict[str, str], name: str, value: str) -> str:
    """Return ``name=value`` as it is typed; a study by the folder that holds it."""
    if value in ("", "True", "False"):
        return known[name]
    text = value[1:-1] if value[0] in "'\"" else value
    if value[0] == "(":
        text = ",".join(re.findall(r"\w+", value))
    if (name, text) == ("workers", "ray"):
        return "--ray"
    if name == "study":
        folder, here = Path(text).parent, Path.cwd()
        text = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    return f"{known[name]} {shlex.quote(text)}"
