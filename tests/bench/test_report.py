"""The benchmark's page and its Markdown, from synthetic rows."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

image = pytest.importorskip("matplotlib.image", reason="the benchmark's extra is not installed")

from gpu_embed.bench import report  # noqa: E402
from gpu_embed.bench.results import Row, RowWriter, write_header  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BASE = Row(
    set="A",
    operation="embedding",
    mode="backward",
    dtype="float32",
    id_dtype="int64",
    tables=1,
    vocab=1024,
    dim=768,
    num_ids=16384,
    hotness=1,
    distribution="uniform",
    unique_ids=1024,
    padding=0.0,
    provider="gpu_embed",
    status="ok",
    device="Synthetic Card",
    torch="9.8.7",
    triton="6.5.4",
    commit="0123456789abcdef",
)
NASTY = '<script>alert(1)</script> & "quoted" | `code` https://example.org/x'
HEADER = {
    "device": "Synthetic Card <2>",
    "driver": "111.22",
    "capability": [9, 0],
    "copy_gbps": 1234.56,
    "clocks": {"sm": "1 MHz"},
    "load": [0.25, 1.5],
    "torch": "9.8.7",
    "triton": "6.5.4",
    "python": "3.99",
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2001-02-03",
    "command": "python -m gpu_embed.bench run --set 'A|B'",
    "seed": 0,
}
VOID = {"meta", "img", "br", "link"}


def row(provider: str, ms: float | None, **changes) -> Row:
    timed = {} if ms is None else {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.1 * ms}
    return replace(BASE, provider=provider, **{**timed, **changes})


ROWS = [
    row("gpu_embed", 0.5),
    row("gpu_embed-sorted", 2.5, step_peak_bytes=3 * 2**19),
    row("torch", 2.0),
    row("torch.compile", 1.0),
    row("liger-kernel", None, status="wrong", match=NASTY),
    row("flag-gems", None, status="missing", note="not installed"),
    row("fbgemm-gpu", None, status="oom", note="5 GiB did not fit"),
    row("gpu_embed", 3.0, set="<odd> set", vocab=4096),
    row("torch", 1.5, set="<odd> set", vocab=4096),
    row("index_add_", None, set="<odd> set", vocab=4096, status="error", note=NASTY),
]


class Page(HTMLParser):
    """Checks that every element is closed, and collects the tables' rows, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[tuple[str, list[tuple[str, str]]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        kind = dict(attributes).get("class", "")
        if tag == "tr":
            self.rows.append((kind, []))
        if tag in ("td", "th"):
            self.rows[-1][1].append(("", kind))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            text, kind = self.rows[-1][1][-1]
            self.rows[-1][1][-1] = (text + data, kind)


def write(directory: Path, rows=ROWS, header=HEADER) -> Path:
    with RowWriter(directory) as writer:
        for one in rows:
            writer.write(one)
    if header:
        write_header(directory, header)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = report.write_report(write(tmp_path_factory.mktemp("results") / "run"))
    assert path.name == "report.html"
    assert {other.name for other in path.parent.iterdir()} == {
        "report.html",
        "results.csv",
        "header.json",
    }
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def provider_rows(page, provider):
    columns = next(
        names for _, cells in page.rows if "provider" in (names := [text for text, _ in cells])
    )
    return [
        dict(zip(columns, cells, strict=False))
        for _, cells in page.rows
        if len(cells) > 2 and cells[0][0] == provider
    ]


def test_the_page_needs_nothing_but_itself(page, source):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object"), tag
        for name in ("src", "href"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value[:60])
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in source
    assert "@import" not in source
    # The one address stands in a message, as text.
    assert set(re.findall(r"https?://[^\s<&]+", source)) == {"https://example.org/x"}


def test_messages_are_escaped(page, source):
    assert "<script" not in source
    assert page.text.count('<script>alert(1)</script> & "quoted" | `code`') == 2
    assert "Set <odd> set" in page.text
    assert "Synthetic Card <2>" in page.text


@pytest.mark.full
def test_a_narrow_screen_can_read_every_table(page, source):
    """At 390 pixels a heading breaks, and a table that is still too wide moves within its own box."""
    narrow = source[source.index("@media (max-width: 1280px)") : source.index("@media print")]
    assert ".scroll { overflow-x: auto; }" in narrow
    # Only numbers and names keep to one line, and not those of the first table.
    assert re.findall(r"([^{}]*) { white-space: nowrap; }", source) == ["\ntd"]
    assert ".why, table.header td { white-space: normal; overflow-wrap: anywhere; }" in source
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag in ("table", "div")]
    assert kinds == ["header", *["scroll", None] * 3]


def test_pictures_are_inside_and_real(page):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    for attributes in pictures:
        assert "How many times faster gpu_embed is than torch" in attributes["alt"]
        data = base64.b64decode(attributes["src"].split(",", 1)[1], validate=True)
        pixels = image.imread(io.BytesIO(data))
        assert pixels[..., :3].std() > 0.01
    assert "Not drawn: cost growth" in page.text


def test_the_header_is_complete(page):
    found = {cells[0][0]: cells[1][0] for _, cells in page.rows if len(cells) == 2}
    assert found["device"] == "Synthetic Card <2>"
    assert found["compute capability"] == "9.0"
    assert found["measured copy bandwidth (GB/s, read plus written)"] == "1,234.6"
    assert found["commit"] == "0123456789abcdef with uncommitted changes"
    assert found["command"] == "python -m gpu_embed.bench run --set 'A|B'"
    assert found["load of the CPU before, 1 and 5 minutes"] == "0.25 1.5"
    assert {"torch", "triton", "driver", "clocks", "Python", "date", "seed"} <= set(found)


def test_every_row_is_there_with_its_state(page):
    ours, slow = provider_rows(page, "gpu_embed")
    assert ours["ms, median"][0] == "0.5"
    assert ours["p20 to p80"][0] == "0.45 to 0.55"
    assert ours["status"] == ("ok", "text")
    assert slow["ms, median"][0] == "3"
    for provider, status, why in (
        ("liger-kernel", "WRONG result", NASTY),
        ("flag-gems", "not available", "not installed"),
        ("fbgemm-gpu", "out of memory", "5 GiB did not fit"),
        ("index_add_", "ERROR", NASTY),
    ):
        (found,) = provider_rows(page, provider)
        assert found["status"] == (status, "text bad")
        assert found["ms, median"][0] == why
    assert "10 rows, 6 ok, 1 WRONG result, 1 not available, 1 ERROR, 1 out of memory" in page.text


def test_ratios_against_the_best_rival_are_highlighted(page):
    ours, slow = provider_rows(page, "gpu_embed")
    (forced,) = provider_rows(page, "gpu_embed-sorted")
    assert ours["best rival / this"] == ("2.00 (torch.compile)", "ahead")
    assert slow["best rival / this"] == ("0.50 (torch)", "behind")
    assert forced["best rival / this"] == ("0.40 (torch.compile)", "behind")
    assert all(found["best rival / this"][0] == "" for found in provider_rows(page, "torch"))


def test_what_is_no_sum_in_a_gradient_stands_above_its_rows(tmp_path):
    with RowWriter(tmp_path) as writer:
        for name in ("gpu_embed", "torch"):
            writer.write(
                replace(BASE, provider=name, mode="backward", zero_fill_ms=0.5, cast_ms=0.25)
            )
    text = report.write_report(tmp_path).read_text()
    said = "; zero-fill of the gradient 0.5 ms, its cast from fp32 0.25 ms"
    assert text.count(said) == 1


def test_the_peak_of_a_step_has_a_column(page):
    (found,) = provider_rows(page, "gpu_embed-sorted")
    assert found["step's peak MiB"] == ("1.5", "")
    assert found["extra MiB"] == ("", "")


def test_growth_is_on_both_pages(tmp_path):
    rows = [row("torch", 2.0 * size, vocab=size) for size in (100, 1000, 10_000)]
    directory = write(tmp_path, rows)
    page = Page(report.write_report(directory).read_text(encoding="utf-8"))
    shown = [cells for _, cells in page.rows if ("V^1.00 ± 0.00", "") in cells]
    assert [[text for text, _ in cells][1:5] for cells in shown] == [
        ["torch", "V = 100", "10,000", "3"]
    ]
    report.write_results_markdown(directory, tmp_path / "page.md")
    assert "V^1.00 ± 0.00 |" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_a_time_beside_a_wrong_result_is_not_shown(tmp_path):
    rows = [row("gpu_embed", 0.123, status="wrong"), row("torch", 1.0)]
    page = Page(report.write_report(write(tmp_path / "run", rows)).read_text(encoding="utf-8"))
    assert "0.123" not in page.text
    (standing,) = report.standings(rows)
    assert (standing.ratios, standing.ours_failed) == ([], 1)


def test_standings_count_by_set_and_mode():
    rows = [
        *ROWS,
        row("gpu_embed", 1.0, vocab=2048),
        row("torch", 8.0, vocab=2048),
        row("gpu_embed", 1.0, vocab=8192),
    ]
    first, second = report.standings(rows)
    assert (first.set, first.mode, first.ratios) == ("A", "backward", [2.0, 8.0])
    assert first.lowest_at.startswith("torch.compile: A backward float32 V=1,024 ")
    assert (first.behind, first.ours_failed, first.unrivalled) == (0, 0, 1)
    assert (second.set, second.ratios, second.behind) == ("<odd> set", [0.5], 1)


def table_lines(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_markdown_names_the_machine_and_holds_every_row(tmp_path):
    run = write(tmp_path / "bench" / "results" / "card-date")
    target = tmp_path / "bench" / "RESULTS.md"
    target.write_text("old")
    report.write_results_markdown(run, target)
    text = target.read_text(encoding="utf-8")
    assert "| device | `Synthetic Card <2>` |" in text
    assert "| command | `python -m gpu_embed.bench run --set 'A\\|B'` |" in text
    assert "| commit | `0123456789abcdef with uncommitted changes` |" in text
    assert "](results/card-date/results.csv)" in text
    cells = [line for line in table_lines(text) if len(line) == 9]
    names = [line[1].replace("\\", "") for line in cells]
    assert all(names.count(name) == 2 for name in ("gpu_embed", "torch"))
    (wrong,) = (line for line in cells if line[1] == "liger-kernel")
    assert wrong[2] == "WRONG result"
    assert wrong[3] == ""
    assert "&lt;script&gt;" in wrong[8]
    assert "<script" not in text
    # Every table has as many cells in each line as in its head.
    assert {len(line) for line in table_lines(text)} == {2, 9, 10}
    assert [path.name for path in target.parent.iterdir() if path.is_file()] == ["RESULTS.md"]


def test_results_elsewhere_are_named_and_not_linked(tmp_path):
    run = write(tmp_path / "far" / "away", header=None)
    target = tmp_path / "page" / "RESULTS.md"
    target.parent.mkdir()
    report.write_results_markdown(run, target)
    text = target.read_text(encoding="utf-8")
    assert "`results.csv` in `away`" in text
    assert str(tmp_path) not in text
    # The header is lost; the rows still say what they were measured on.
    assert "| device | `Synthetic Card` |" in text
    assert "missing or unreadable" in text


def test_the_committed_page_holds_no_figure_without_its_machine_and_commit():
    text = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    assert "synthetic" not in text.lower()
    if "| commit |" in text:
        assert "| device |" in text
        assert "| command |" in text
    else:
        assert "still to be measured" in text
        assert "make gpu" in text
        assert not re.search(r"\d", text.replace("Generated", ""))
