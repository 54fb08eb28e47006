"""The parts of a page of results, tables and figures, and the HTML that shows them.

The page holds its pictures and its style, needs no script and loads nothing.
"""

import base64
import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table."""

    label: str
    group: str = ""
    """A heading over this column and its neighbours of the same group."""
    is_text: bool = False

    @property
    def csv_name(self) -> str:
        return f"{self.group}: {self.label}" if self.group else self.label


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the page shows, and what the CSV file holds instead if that is a number."""

    text: str
    value: float | int | None = None
    is_outside: bool = False
    """Whether it is further from the paper's than we said that it may be."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    folded: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings over the columns and how many each spans; empty if there are none."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = column.group, spans[-1][1] + 1
            else:
                spans.append((column.group, 1))
        return spans if any(group for group, _ in spans) else []


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture."""

    file: str
    alt: str
    uri: str
    """The PNG itself."""


@dataclasses.dataclass(frozen=True)
class Figure:
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


def write_page(path: pathlib.Path, template: str, **content: Any) -> None:
    """Writes a page, which is whole at any moment, from a template that gets ``content``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(environment.get_template(template).render(content), encoding="utf-8")
    os.replace(partial, path)


def write_table(directory: pathlib.Path, table: Table) -> None:
    """Writes the CSV file of a table, with numbers as they are."""
    write_csv(
        directory / f"{table.name}.csv",
        [column.csv_name for column in table.columns],
        [[cell.text if cell.value is None else cell.value for cell in row] for row in table.rows],
    )


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_panel(path: pathlib.Path, alt: str) -> Panel:
    """Of a PNG file in the folder ``report`` beside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Panel(f"report/{path.name}", alt, f"data:image/png;base64,{data}")


def text_columns(*labels: str) -> list[Column]:
    return [Column(label, is_text=True) for label in labels]


def number_columns(*labels: str, group: str = "") -> list[Column]:
    return [Column(label, group) for label in labels]


def count_cell(value: int) -> Cell:
    """``12,345``."""
    return Cell(f"{value:,}", value)


def significant_cell(value: float) -> Cell:
    """Three digits of it."""
    return Cell(f"{value:.3g}".replace("-", "−"), value)
