"""For the API reference: what our docstrings have and griffe's Google style does not know."""

import re
import textwrap
from typing import Any

import griffe

# reStructuredText's `::` and the indented lines after it.
LITERAL_BLOCK = re.compile(r"^(?P<said>\S.*)::\n\n(?P<code>(?: {4}.*(?:\n|\Z)|\n)+)", re.MULTILINE)
# Arguments that share a description.
SHARED = re.compile(
    r"^    (?P<names>[a-z]\w*(?:, [a-z]\w*)+)(?P<said>:.*(?:\n {8}.*)*)", re.MULTILINE
)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before its sections are parsed."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            value = LITERAL_BLOCK.sub(_fenced, obj.docstring.value)
            obj.docstring.value = SHARED.sub(_each_alone, value)


def _fenced(found: re.Match[str]) -> str:
    said, code = found["said"], textwrap.dedent(found["code"]).strip()
    # With its colon it would be a section of Google's style.
    said = "**Example**" if said == "Example" else f"{said}:"
    return f"{said}\n\n```python\n{code}\n```\n\n"


def _each_alone(found: re.Match[str]) -> str:
    return "\n".join(f"    {name}{found['said']}" for name in found["names"].split(", "))
