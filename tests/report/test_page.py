"""The page: complete, self-contained, escaped, and silent about what it was not given."""

import html.parser
import re

import numpy as np
import pytest

from jaxood.report import figures, page, tables

EVIL = '<script>alert(1)</script>'


class Parser(html.parser.HTMLParser):
    """Collects what loads something, the ids, the links within, and checks that tags close."""

    VOID = ('meta', 'img', 'br', 'i/')

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.links, self.open, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == [], f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ('src', 'srcset', 'data') or (name.endswith('href') and value[0] != '#'):
                self.loads.append(value)
            if tag == 'section' and name == 'id':
                self.ids.append(value)
            if tag == 'a' and name == 'href':
                self.links.append(value[1:])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def content_of(runs, groups, *, main='diffusion', **more):
    summary = tables.summary(runs, groups, draws=20)
    comparisons = {
        arm: tables.compare(runs, groups, main, arm, 'energy', draws=20)
        for arm in summary['cells']
        if arm != main
    }
    verdict = tables.verdict(summary, 'energy', main, comparisons)
    return page.Content(
        title='Digits', what='What was run.', verdict=verdict, summary=summary, method='energy',
        main=main, comparisons=comparisons, **more,
    )  # fmt: skip


@pytest.fixture
def full(runs, groups):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    sheet = figures.gallery(images)
    return content_of(
        runs,
        groups,
        arms={'none': EVIL},
        outliers={
            'diffusion': page.Outliers('Mixed.', 1000, 640, {EVIL: 360}, sheet, sheet),
            'none': page.Outliers(),
        },
        sections=[page.Section('judge', EVIL, [
            EVIL, sheet, page.Table(['of', EVIL], [['a', ('97.10', EVIL)]], EVIL),
        ], EVIL)],
        histograms=figures.score_histograms(runs, 'energy'),
        roc=figures.roc_curves(runs, 'energy'),
        tsne=figures.tsne_figure({'ID': np.eye(2), EVIL: np.ones((3, 2))}),
        mistaken={
            'ID': figures.mistaken(images, np.arange(5), np.arange(5), highest=True,
                                   class_names=[EVIL] * 5)
        },
        curves=figures.learning_curves({EVIL: {'loss': [{'step': 1, 'loss': 1.0}]}}),
        costs=[{'stage': 'synthesise', 'what': EVIL, 'seconds': 185.2, 'times': 3,
                'images_per_s': 5.4}, {'stage': 'score'}],
        score_costs=tables.score_costs(runs),
        published=[page.Published('DOG, table 1', ['SVHN', 'iSUN'], ['fpr95_id', 'auroc'], [
            {'name': 'DOG', 'published': [(0.037, 0.9933), (0.0065, 0.9971)],
             'ours': [None, (0.25, 0.5)]},
        ])],
        settings=f'name: {EVIL}',
        facts={'Versions': {'jax': '0.10'}},
    )  # fmt: skip


SECTIONS = [
    *('results', 'outliers', 'judge', 'histograms', 'roc', 'scores', 'tsne', 'mistaken'),
    *('training', 'cost', 'published', 'settings', 'reproduce'),
]


def test_the_page_is_whole_and_loads_nothing(tmp_path, full):
    path = tmp_path / 'report.html'
    page.write_report(path, full)
    text = path.read_text(encoding='utf-8')
    parsed = Parser(text)
    assert parsed.ids == SECTIONS
    assert parsed.links == SECTIONS
    assert parsed.loads
    assert all(value.startswith('data:image/') for value in parsed.loads)
    assert not {'script', 'link', 'iframe'} & set(parsed.tags)
    assert 'url(http' not in text
    assert '@import' not in text
    assert set(re.findall(r'https?://[\w./]+', text)) <= {
        'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink',  # names, not addresses
    }  # fmt: skip


def test_names_from_outside_are_escaped(full):
    text = page.render(full)
    assert EVIL not in text
    assert text.count('&lt;script&gt;') >= 15


def test_a_section_shows_its_parts_in_their_order(full):
    text = page.render(full)
    start = text.index('<section id="judge">')
    part = text[start : text.index('</section>', start)]
    sought = ['<h2>', '<p>', 'data:image/', '<h3>', '<th>of</th>', '<th>a</th><td>97.10<small>']
    found = [part.index(what) for what in [*sought, '<p class="note">']]
    assert found == sorted(found)


def test_every_arm_set_and_number_is_there(full, groups):
    text = page.render(full)
    for arm, by_method in full.summary['cells'].items():
        assert arm in text
        for column in ('mean:all', 'mean:far', *groups):
            for m in tables.SHOWN:
                cell = by_method['energy'][column][m]
                interval = f'{tables.percent(cell["low"])}–{tables.percent(cell["high"])}'
                assert tables.percent(cell['mean']) in text
                assert f'<small>{interval}</small>' in text, (arm, column, m)
    for name in groups:
        assert f'<b>{name}</b>' in text
        assert f'{full.summary["counts"][name]}</b> OOD images: {name}' in text
    assert full.verdict in text
    assert '(64.0 %)' in text
    assert '3 min 05 s' in text


def test_the_best_of_a_column_is_bold_and_the_other_is_not(full):
    text = page.render(full)
    good, poor = (
        tables.percent(full.summary['cells'][arm]['energy']['mean:all']['auroc']['mean'])
        for arm in ('diffusion', 'none')
    )
    assert f'<b>{good}</b>' in text
    assert f'<b>{poor}</b>' not in text


def test_published_cells_that_nobody_measured_say_so(full):
    text = page.render(full)
    assert '3.70 / 99.33' in text
    assert '25.00 / 50.00' in text
    assert text.count('not measured') == 1


def test_what_is_missing_leaves_no_heading(experiment, groups):
    """One arm, one seed, one score, one set: the smallest experiment there is."""
    runs = experiment({'diffusion': 1.0}, seeds=(0,), methods=('energy',))
    text = page.render(content_of(runs, {'photos': 'far'}))
    parsed = Parser(text)
    assert parsed.ids == parsed.links == ['results']
    assert 'minus the other arms' not in text
    assert 'mean of all' not in text
    assert 'one seed' in text
    assert 'held_out' not in text


def test_arms_may_lack_the_main_score_or_labels(runs, groups):
    kept = [s for s in runs if (s.arm, s.method) != ('none', 'energy')]
    summary = tables.summary(kept, groups, draws=20)
    text = page.render(page.Content('T', 'W', summary, 'energy'))
    Parser(text)
    assert '<td>–\n' in text or '>–' in text


@pytest.mark.parametrize(('seconds', 'text'), [
    (0.314, '0.31 s'), (9.999, '10.00 s'), (59.6, '1 min 00 s'), (185.2, '3 min 05 s'),
    (7810, '2 h 10 min'),
])  # fmt: skip
def test_durations(seconds, text):
    assert page._duration(seconds) == text
