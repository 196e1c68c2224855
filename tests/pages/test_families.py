"""docs/families.md is what `make families` writes of the data that is kept, and tells it truly."""

import re

import pytest
from commands import ROOT
from families_page import (
    ALONE,
    IDLE,
    NO_TABLE,
    NOT_BUILT,
    NOT_RUN,
    OVERRIDDEN,
    SECTIONS,
    SWAPPED,
    WHOLE,
    WRONG,
    Line,
    by_outcome,
    outcome,
    page,
    read_data,
    summary,
    write_data,
)

DATA = (ROOT / "tests/support/families.json").read_text()
LINES, VERSIONS = read_data(DATA)
PAGE = (ROOT / "docs/families.md").read_text()


def test_the_page_is_what_the_generator_writes():
    assert page(LINES, VERSIONS) == PAGE
    assert write_data(LINES, VERSIONS) == DATA


def test_the_versions_are_the_pinned_ones():
    pins = (ROOT / "constraints.txt").read_text()
    for name, version in VERSIONS.items():
        assert re.search(rf"^{name}==([\d.]+)", pins, re.M)[1] == version
        assert f"{name} {version}" in PAGE


def test_every_type_stands_once():
    groups = by_outcome(LINES)
    assert groups.keys() <= SECTIONS.keys()
    types = {line.model_type for line in LINES}
    assert sum(map(len, groups.values())) == len(types)
    assert f"{len(types)} model types: " in PAGE
    for state, own in groups.items():
        assert f"| {len(own)} | {SECTIONS[state].said} |" in PAGE


def test_no_lookup_of_ours_is_wrong():
    assert not [line for line in LINES if line.state == WRONG]


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        ([SWAPPED, SWAPPED], SWAPPED),
        ([SWAPPED, WHOLE], SWAPPED),
        ([SWAPPED, OVERRIDDEN], OVERRIDDEN),
        ([OVERRIDDEN, IDLE], IDLE),
        ([IDLE, ALONE], ALONE),
        ([ALONE, WRONG], WRONG),
        ([WHOLE], NO_TABLE),
        ([NO_TABLE], NO_TABLE),
        ([NOT_RUN], NOT_RUN),
        ([NOT_BUILT], NOT_BUILT),
    ],
)
def test_a_type_is_as_its_worst_table(states, worst):
    lines = [Line("a", "A", state, f"table{place}") for place, state in enumerate(states)]
    assert outcome(lines) == worst
    assert summary(lines) == f"1 model types: 1 {SECTIONS[worst].heading.lower()}"


def test_a_page_of_every_outcome():
    lines = [
        Line(
            f"type {state}",
            "Model",
            state,
            "layers.3.words = tied",
            "ScaledWords",
            "Error: a|b `c`",
        )
        for state in (SWAPPED, OVERRIDDEN, ALONE, IDLE, NO_TABLE, NOT_RUN, NOT_BUILT, WRONG)
    ]
    text = page(lines, {"transformers": "1.2.3", "torch": "4.5.6"})
    assert (
        "8 model types: 6 could be built and run. In 1 of them a lookup of ours was **not**" in text
    )
    assert "| `type overridden` | `layers.N.words` (ScaledWords) |" in text
    assert "| `type not run` | `Error: a/b 'c'` |" in text
    assert "| `Error: a/b 'c'` | `type not built` |" in text
    headings = re.findall(r"^## (.*)", text, re.M)
    assert headings == [one.heading for one in SECTIONS.values()]
    places = re.findall(r"\[below\]\(#([\w-]+)\)", text)
    assert places == [one.lower().replace(" ", "-") for one in headings]
