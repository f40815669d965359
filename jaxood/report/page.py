"""`report.html`: one file that asks nobody for anything, built from `page.html` and `page.css`."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from jaxood.report import figures, tables


@dataclasses.dataclass
class Outliers:
    """The outliers of one arm.

    Attributes:
        about: a sentence on how they are made.
        num_candidates, num_kept: for the acceptance rate; None if nothing was filtered.
        reasons: why candidates were rejected -> how many.
        kept, rejected: `figures.gallery`.
        shared: other arms that have the same.
    """

    about: str = ''
    num_candidates: int | None = None
    num_kept: int | None = None
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kept: Markup = Markup()
    rejected: Markup = Markup()
    shared: Sequence[str] = ()


@dataclasses.dataclass
class Published:
    """A table of a paper beside our own figures. Numbers are fractions, None is 'not measured'.

    Attributes:
        source: 'DOG, table 1, CIFAR-10 (WRN-40-2)'.
        columns: data set names.
        metrics: what a cell holds, in order, e.g. ('fpr95_id', 'auroc').
        rows: dicts with `name`, `published` and `ours`: a list with one cell a column, each a
            tuple of numbers in the order of `metrics`, or None.
        note: a caveat to print under it.
    """

    source: str
    columns: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    note: str = ''


@dataclasses.dataclass
class Table:
    """A table of a section. A cell is text, or (text, small print under it).

    Attributes:
        header: the columns' heads; the first stands over the rows' names.
        rows: a name and its cells each.
        prose: whether cells are text that wraps, rather than numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, str]]]
    title: str = ''
    prose: bool = False


@dataclasses.dataclass
class Section:
    """A part of the page that is about one method.

    Attributes:
        id: its anchor.
        parts: in their order: text for a paragraph, markup of a figure, a `Table`.
        note: small print at its end.
    """

    id: str
    title: str
    parts: Sequence[str | Markup | Table]
    note: str = ''


@dataclasses.dataclass
class Content:
    """What the page shows. Text is escaped; figures are markup from `figures`. What is empty is
    left out, heading and all.

    Attributes:
        title, what: the heading, and one paragraph on what was run.
        verdict: `tables.verdict` or `grid.verdict`, a paragraph a line.
        summary: `tables.summary`; `method`: the main score's label in it.
        main, comparisons: the main arm, and other arm -> `tables.compare(…, main, other, …)`.
        arms: arm -> what it is, in a few words.
        grids: 'own' and each score's label -> `grid.grid`; empty where arms are no grid.
        outliers: the first arm that has them -> `Outliers`.
        sections: what methods tell of themselves, behind the outliers.
        histograms, roc, tsne, curves: markup; `tsne_about`: which features are mapped.
        mistaken: heading -> `figures.mistaken`.
        costs: rows with `stage`, and optionally `what`, `times` (how often), `seconds` (each time),
            `images_per_s` (without compilation).
        score_costs: `tables.score_costs`.
        every_score: show each arm's scores set by set, not their mean alone.
        settings: the config as YAML.
        facts: heading -> name -> value: versions, devices, hashes.
    """

    title: str
    what: str
    summary: Mapping[str, Any]
    method: str
    verdict: str = ''
    main: str = ''
    comparisons: Mapping[str, tables.Cells] = dataclasses.field(default_factory=dict)
    grids: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    arms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outliers: Mapping[str, Outliers] = dataclasses.field(default_factory=dict)
    sections: Sequence[Section] = ()
    histograms: Markup = Markup()
    roc: Markup = Markup()
    tsne: Markup = Markup()
    tsne_about: str = ''
    mistaken: Mapping[str, Markup] = dataclasses.field(default_factory=dict)
    curves: Markup = Markup()
    costs: Sequence[Mapping[str, Any]] = ()
    score_costs: Sequence[Mapping[str, Any]] = ()
    every_score: bool = False
    published: Sequence[Published] = ()
    settings: str = ''
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def write_report(path, content: Content) -> None:
    """Renders the page and writes it: UTF-8, self-contained, no script."""
    epath.Path(path).write_text(render(content))


def render(content: Content) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        'percent': tables.percent,
        'duration': _duration,
        'number': _number,
    }
    return environment.get_template('page.html').render(
        c=content,
        t=tables,
        columns=tables.shown_columns(content.summary['groups']),
        colours=figures.colours(list(content.summary['cells'])),
        intervals=figures.intervals(content.summary, content.method),
        contents=[],
    )


def _duration(seconds: float) -> str:
    """'0.31 s', '42 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f'{seconds:.2f} s'
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60:02d} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'


def _number(value: float) -> str:
    """Three digits, or a whole number with thousands apart."""
    return f'{value:,.0f}' if abs(value) >= 100 or value == int(value) else f'{value:.3g}'
