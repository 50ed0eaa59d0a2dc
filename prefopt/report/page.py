"""What every page of prefopt shares: how a template becomes HTML, and how a file takes its place."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from prefopt.report.plots import number


def render(template: str, **values: Any) -> str:
    """A template of this package as one self-contained page; everything put into it is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Any:
    """Compiles each template once in a process."""
    import jinja2  # here, so that the training loop can ask for alarms without it

    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("prefopt.report", ""), undefined=jinja2.StrictUndefined, **options)
    environment.filters.update(number=number)
    return environment


def write_page(path: Path, html: str) -> Path:
    """Writes the page under a temporary name in the same folder and renames it, so that no reader sees half of it."""
    draft = path.with_name(f".{path.name}.part")
    try:
        draft.write_bytes(html.encode("utf-8", "replace"))  # samples may hold half a surrogate pair
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path
