"""The parts of an objective's docstring: its equations, its prose, and what it says under each label."""

from __future__ import annotations

import re

LABELS = ("Rewards", "Ranges", "When", "Limits")
_LABEL = re.compile(rf"({'|'.join(LABELS)}):(?: |$)", re.MULTILINE)


def doc_parts(doc: str) -> tuple[list[str], str, dict[str, str]]:
    """Equations, prose and labelled texts of a docstring without its first line.

    An equation is a line that begins with a name and ` = `. A label opens a sentence and speaks until the next one, so labels come last.
    """
    body = "\n".join(line.strip() for line in doc.splitlines()[1:])
    equations: list[str] = []
    texts: dict[str, list[str]] = {"": []}
    current = ""
    for line in re.sub(rf"(?<=[.)]) (?={_LABEL.pattern})", "\n", body, flags=re.MULTILINE).splitlines():
        if match := _LABEL.match(line):
            current = match[1]
            texts[current] = [line[match.end() :]]
        elif not current and re.match(r"[\w()|, ]{1,24} = ", line):
            equations.append(line)
        elif line:
            texts[current].append(line)
    return equations, " ".join(texts.pop("")), {name: " ".join(filter(None, lines)) for name, lines in texts.items()}
