"""What became of each model type of transformers: the words for it, how it is kept, and docs/families.md."""

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """What became of one table of a model type, or of the type as a whole; a line of families.json."""

    model_type: str
    model: str  # its class
    state: str
    table: str = ""  # its name in the model
    kind: str = ""  # the class of its module
    note: str = ""


# Of a table.
SWAPPED = "swapped"  # looked up with our op after the swap, bit-equal to torch's lookup
OVERRIDDEN = "overridden"  # looked up with our op under override_aten alone
ALONE = "alone"  # looked up, and never with our op
WHOLE = "whole"  # the model reads its weight, and never looks up
IDLE = "idle"  # no input that was tried reaches it
WRONG = "wrong"  # our op, and another result than torch's
# Of a type.
NO_TABLE = "no table"
NOT_RUN = "not run"
NOT_BUILT = "not built"


def write_data(lines: Iterable[Line], of: dict[str, str]) -> str:
    """The text of families.json, a line of it for each of ours."""
    rows = ",\n".join(json.dumps(one, ensure_ascii=False) for one in sorted(lines))
    return f'{{"versions": {json.dumps(of)},\n"lines": [\n{rows}\n]}}\n'


def read_data(text: str) -> tuple[list[Line], dict[str, str]]:
    data = json.loads(text)
    return [Line(*one) for one in data["lines"]], data["versions"]


def outcome(lines: Sequence[Line]) -> str:
    """What became of a type: the worst of its tables; those that nobody looks up are no fault."""
    states = {line.state for line in lines}
    for state in (NOT_BUILT, NOT_RUN, WRONG, ALONE, IDLE, OVERRIDDEN, SWAPPED):
        if state in states:
            return state
    return NO_TABLE


def by_type(lines: Iterable[Line]) -> dict[str, list[Line]]:
    types = defaultdict(list)
    for line in sorted(lines):
        types[line.model_type].append(line)
    return types


def by_outcome(lines: Iterable[Line]) -> dict[str, dict[str, list[Line]]]:
    found: dict[str, dict[str, list[Line]]] = defaultdict(dict)
    for model_type, own in by_type(lines).items():
        found[outcome(own)][model_type] = own
    return found


def counted(lines: Iterable[Line]) -> dict[str, int]:
    """How many model types had each outcome that occurs."""
    groups = by_outcome(lines)
    return {state: len(groups[state]) for state in SECTIONS if state in groups}


def summary(lines: Iterable[Line]) -> str:
    counts = counted(lines)
    parts = [f"{count} {SECTIONS[state].heading.lower()}" for state, count in counts.items()]
    return f"{sum(counts.values())} model types: {', '.join(parts)}"


def listed(model_types: Iterable[str]) -> str:
    text = ", ".join(f"`{one}`" for one in model_types) or "none"
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def tables_of(lines: Iterable[Line], *states: str) -> str:
    """Names and classes of the tables in these states; those whose names differ in a number, once."""
    names: dict[str, None] = {}
    for line in lines:
        if line.state in states:
            name = re.sub(r"[.][0-9]+(?=[.]|$)", ".N", line.table.split(" = ")[0])
            kind = "" if line.kind in ("", "Embedding") else f" ({line.kind})"
            names[f"`{name}`{kind}"] = None
    return ", ".join(names) or "none"


def shown(note: str) -> str:
    """A message as a cell; nothing in it is taken for markup."""
    quoted = note.replace("`", "'").replace("|", "/")
    return f"`{quoted}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


class Section(NamedTuple):
    """What the page says of the types with one outcome."""

    said: str
    heading: str
    advice: str


SECTIONS = {
    SWAPPED: Section(
        "`replace_embeddings` reaches every table",
        "Reached by the swap",
        "Swap; there is nothing else to do.",
    ),
    OVERRIDDEN: Section(
        "some table needs `override_aten`; with it every table is reached",
        "Reached with override_aten",
        """These hold subclasses that scale rows or shift positions, and leave the rest to torch's lookup. Swap, and
where the tables in the last column matter, run the model within
[`gpu_embed.override_aten()`](swap.md#without-a-swap-override_aten). Tables of positions are small.""",
    ),
    ALONE: Section(
        "some table is reached by neither",
        "Reached by neither",
        """These models read rows of a table in their own way, most of them by an index into the weight (`weight[ids]`).
Nothing is to be done: such a table works as before, and the other tables of the model are served.""",
    ),
    IDLE: Section(
        "every table that our inputs reach is served; they do not reach all",
        "Not all tried",
        "Call `report.verify(...)` with an input of your own: it names each swapped table, and whether it was reached.",
    ),
    NO_TABLE: Section("nothing is looked up", "No lookup", ""),
    NOT_RUN: Section(
        "built and swapped, but no input that we made up fitted",
        "Not run",
        "Call `report.verify(...)` with an input of your own. Here is what the models said first.",
    ),
    NOT_BUILT: Section(
        "not built",
        "Not built",
        "They need another package, are parts of a model without a class of their own, or the sizes that a\n"
        "configuration has by itself, or that we made small, do not fit each other. Swap yours: the report says what\n"
        "was reached, and `report.verify(...)` proves it.",
    ),
    WRONG: Section(
        "a lookup of ours differs from torch's", "Wrong", "Do not swap these, and tell us."
    ),
}


def page(lines: Sequence[Line], versions: Mapping[str, str]) -> str:
    """docs/families.md."""
    groups = by_outcome(lines)
    counts = counted(lines)
    run = sum(n for state, n in counts.items() if state not in (NOT_BUILT, NOT_RUN))
    text = f"""# Model families

Which tables of which models a [swap](swap.md) reaches: every model type of transformers {versions["transformers"]},
with torch {versions["torch"]} on a CPU. Each was built small and with random weights, without a network, then swapped,
and run on inputs that we made up. Every lookup of ours was compared with torch's.

{sum(counts.values())} model types: {run} could be built and run. {verdict(counts)}

"""
    rows = []
    for state, count in counts.items():
        said, heading, _ = SECTIONS[state]
        place = heading.lower().replace(" ", "-")
        rows.append((str(count), said, f"[below](#{place})"))
    text += table(("model types", "what", "which"), rows)
    text += """
A table is what `torch.nn.Embedding`, `torch.nn.EmbeddingBag`, their subclasses or `torch.nn.functional.embedding` look
up in. A parameter that a model adds as a whole, such as the positions of many vision models, is none. What reaches a
table depends on its class, and not on sizes. Detectors whose backbone is timm's got transformers' ResNet in its place.

```
make families
make families FAMILIES="bert gemma"
```

The first writes this page anew, for the versions that are installed. The second prints what becomes of these two.

Search this page for the type of your model, `model.config.model_type`. In names of tables, `N` stands for the number
of a layer; `(computed)` is a table that is no parameter and no buffer.
"""
    for state in counts:
        _, heading, advice = SECTIONS[state]
        parts = [f"## {heading}", advice, section(state, groups[state])]
        text += "".join(f"\n{part.rstrip()}\n" for part in parts if part)
    return text


def verdict(counts: Mapping[str, int]) -> str:
    if counts.get(WRONG):
        return f"In {counts[WRONG]} of them a lookup of ours was **not** torch's, bit for bit."
    return "All lookups of ours were bit-equal to torch's."


def section(state: str, types: Mapping[str, Sequence[Line]]) -> str:
    """What an outcome's section holds."""
    if state in (SWAPPED, NO_TABLE):
        return listed(types)
    if state == NOT_RUN:
        return table(
            ("model type", "it said"),
            ((f"`{one}`", shown(own[0].note)) for one, own in types.items()),
        )
    if state == NOT_BUILT:
        reasons = defaultdict(list)
        for model_type, own in types.items():
            reasons[own[0].note].append(f"`{model_type}`")
        return table(
            ("why", "model types"),
            ((shown(note), ", ".join(found)) for note, found in sorted(reasons.items())),
        )
    heads = {
        WRONG: "wrong",
        ALONE: "by neither",
        IDLE: "not tried",
        SWAPPED: "by the swap",
        OVERRIDDEN: "by `override_aten` alone",
    }
    used = [
        one for one in heads if any(line.state == one for own in types.values() for line in own)
    ]
    return table(
        ("model type", *(heads[one] for one in used)),
        ((f"`{name}`", *(tables_of(own, one) for one in used)) for name, own in types.items()),
    )
