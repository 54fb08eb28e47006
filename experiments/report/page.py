"""The parts of a page of results, tables and figures, and the HTML that shows them.

The page holds its pictures and its style, needs no script and loads nothing.
"""

import base64
import csv
import dataclasses
import itertools
import os
import pathlib
import tomllib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jinja2

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_WORDS = tomllib.loads((_TEMPLATES / "words.toml").read_text(encoding="utf-8"))


def words(key: str, **values: Any) -> str:
    """A text of ``words.toml``, e.g. ``"figure4.caption"``."""
    table, name = key.split(".")
    return _WORDS[table][name].format(**values)


class Cell(NamedTuple):
    """What the page shows, and what the CSV file holds instead if that is a number."""

    text: str
    value: float | int | None = None
    is_outside: bool = False  # further from the paper's than we said that it may be


class Column(NamedTuple):
    """A column of a table, and what it shows of the subject of a row."""

    label: str
    cell: Callable[[Any], Cell | str]
    group: str = ""  # a heading over this column and its neighbours of the same group
    is_text: bool = False


number = Column
text = lambda label, cell: Column(label, cell, is_text=True)


class Table(NamedTuple):
    """A row for each subject. The first column names the rows."""

    name: str
    columns: Sequence[Column]
    subjects: Sequence[Any]
    notes: Sequence[str] = ()
    folded: bool = False
    key: str = ""  # where its caption is in words.toml, unless it is its name

    @property
    def caption(self) -> str:
        return words(f"{self.key or self.name}.caption", count=len(self.subjects))

    @property
    def rows(self) -> list[list[Cell]]:
        rows = [[column.cell(subject) for column in self.columns] for subject in self.subjects]
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings over the columns and how many each spans; empty if there are none."""
        spans = itertools.groupby(self.columns, lambda column: column.group)
        found = [(group, len(list(columns))) for group, columns in spans]
        return found if any(group for group, _ in found) else []

    def write(self, directory: pathlib.Path) -> None:
        """Writes its CSV file, with numbers as they are."""
        header = [f"{c.group}: {c.label}" if c.group else c.label for c in self.columns]
        rows = [[c.text if c.value is None else c.value for c in row] for row in self.rows]
        write_csv(directory / f"{self.name}.csv", header, rows)


class Panel(NamedTuple):
    """One picture, from a PNG file in the folder ``report`` beside the page."""

    path: pathlib.Path
    alt: str

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


class Figure(NamedTuple):
    """Panels side by side where there is room; ``name`` is that of their CSV file."""

    name: str
    caption: str
    panels: Sequence[Panel]


@dataclasses.dataclass
class Section:
    """A part of the page. ``missing`` is the command that makes what is not there yet."""

    anchor: str
    title: str
    paragraphs: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    missing: str = ""


def write_page(path: pathlib.Path, **content: Any) -> None:
    """Writes the page, which is whole at any moment."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(environment.get_template("report.html").render(content), encoding="utf-8")
    os.replace(partial, path)


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
