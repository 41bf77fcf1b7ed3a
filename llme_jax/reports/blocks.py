"""What a report is made of, and the same report as one HTML file and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from llme_jax.reports.bootstrap import Difference

STYLE = """
:root{--bg:#fff;--fg:#1d2430;--dim:#5b6675;--rule:#dde2e8;--card:#f5f7f9;--good:#0a7d4f;--bad:#b3261e;
--mild:#8a6100;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a3417f;--c4:#b07800;--c5:#3f8fc4}
@media(prefers-color-scheme:dark){:root{--bg:#14181e;--fg:#e4e9ef;--dim:#9aa6b4;--rule:#303844;
--card:#1c222a;--good:#4cc38a;--bad:#ff8078;--mild:#e0b050;--c0:#5ab0e6;--c1:#ff9a56;--c2:#3fd0a0;
--c3:#e08fc0;--c4:#f0bf50;--c5:#8fc8f0}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.2rem 1rem 4rem}h1{font-size:1.5rem;margin:.3rem 0}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.5rem 0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}th{color:var(--dim);font-weight:600}
td{white-space:nowrap}.text{text-align:left;white-space:normal;min-width:13rem}
.scroll{margin:.8rem 0}
.verdict{background:var(--card);border-left:6px solid var(--mild);padding:.8rem 1rem;margin:1rem 0;
font-size:1.1rem}.verdict.WIN{border-color:var(--good)}.verdict.REGRESSION{border-color:var(--bad)}
.verdict b{margin-right:.6rem}.WIN b{color:var(--good)}.REGRESSION b{color:var(--bad)}
.MARGINAL b{color:var(--mild)}svg{width:100%;max-width:44rem;height:auto;display:block}
svg text{font-size:12px;fill:var(--dim)}svg .name{fill:var(--fg);text-anchor:end}
.mid{text-anchor:middle}.end{text-anchor:end}.grid{stroke:var(--rule)}
.zero{stroke:var(--dim);stroke-dasharray:4 3}
.line{fill:none;stroke-width:2}.bar{opacity:.6}.legend{font-size:.85rem;color:var(--dim)}
.legend span{margin-right:1.1rem;white-space:nowrap}.legend i{display:inline-block;width:.8em;
height:.8em;margin-right:.35em;border-radius:2px}
pre{background:var(--card);padding:.7rem .9rem;font-size:.82rem;white-space:pre-wrap;
overflow-wrap:anywhere}details{margin:.5rem 0}summary{cursor:pointer;color:var(--dim)}
@media(max-width:600px){svg text{font-size:17px}}
"""
COLOURS = "".join(
    f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{background:var(--c{i})}}"
    for i in range(6)
)
SHOWN = 220  # letters of a text in a table
EXAMPLES = 5
ROUNDING = 1e-5  # of a log-likelihood, which the width of its batch rounds otherwise


def signed(value: float) -> str:
    return f"{value:+.4f}"


def between(found: Difference) -> str:
    return f"{signed(found.low)} to {signed(found.high)}"


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


@dataclass
class Verdict:
    """The line that stands first: one word, and what it is about."""

    word: str
    said: str

    def html(self) -> str:
        return f'<p class="verdict {self.word}"><b>{self.word}</b> {escape(self.said)}</p>'

    def markdown(self) -> str:
        return f"**{self.word}** {self.said}"


@dataclass
class Paragraph:
    said: str

    def html(self) -> str:
        return f"<p>{escape(self.said)}</p>"

    def markdown(self) -> str:
        return self.said


@dataclass
class Table:
    """Rows of texts; columns of `texts` are read, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()

    def html(self) -> str:
        head = "".join(self._cell(i, cell, "th") for i, cell in enumerate(self.head))
        rows = "".join(
            "<tr>" + "".join(self._cell(i, cell) for i, cell in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def _cell(self, column: int, cell: str, tag: str = "td") -> str:
        kind = ' class="text"' if column in self.texts else ""
        return f"<{tag}{kind}>{escape(cell)}</{tag}>"

    def markdown(self) -> str:
        rows = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(
            "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |"
            for row in rows
        )


@dataclass
class Chart:
    """An SVG of charts.py under its title; Markdown does without."""

    title: str
    svg: str

    def html(self) -> str:
        return f"<h3>{escape(self.title)}</h3>{self.svg}"

    def markdown(self) -> str:
        return ""


@dataclass
class Code:
    """Text as it is; folded up in HTML where it has a summary, not in Markdown when it is long."""

    said: str
    summary: str = ""
    long: bool = False

    def html(self) -> str:
        pre = f"<pre>{escape(self.said)}</pre>"
        if not self.summary:
            return pre
        return f"<details><summary>{escape(self.summary)}</summary>{pre}</details>"

    def markdown(self) -> str:
        if self.long:
            return ""
        code = f"```\n{self.said}\n```"
        return f"{self.summary}:\n\n{code}" if self.summary else code


Block = Verdict | Paragraph | Table | Chart | Code


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def won_and_lost(
    one: str,
    many: str,
    name: str,
    gains: np.ndarray,
    columns: Sequence[str],
    example: Callable[[int], list[str]],
) -> Section:
    """How many queries got better with the run of that name, and those that most changed.

    Args:
        one, many: what a query is called.
        columns: of an example's texts, behind the query and what is right.
        example: cells of query i: the query, what is right, these texts, before and after.
    """
    gains = np.where(np.abs(gains) < ROUNDING, 0.0, gains)
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    said = f"{won} {many} are better with {name}, {lost} worse, {len(gains) - won - lost} equal."
    order = np.argsort(-gains, kind="stable")
    blocks = [Paragraph(said)]
    for title, chosen in (
        ("most won", [i for i in order[:EXAMPLES] if gains[i] > 0]),
        ("most lost", [i for i in order[::-1][:EXAMPLES] if gains[i] < 0]),
    ):
        if rows := [example(int(i)) for i in chosen]:
            head = [f"{one} ({title})", "right", *columns, "before", "after"]
            blocks.append(Table(head, rows, texts=frozenset(range(2 + len(columns)))))
    return Section(f"{many.capitalize()} won and lost", blocks)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One file that needs no other and no network."""
    body = "".join(
        (f"<h2>{escape(section.title)}</h2>" if section.title else "")
        + "".join(block.html() for block in section.blocks)
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}{COLOURS}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        said = [text for block in section.blocks if (text := block.markdown())]
        if said:
            parts += ([f"## {section.title}"] if section.title else []) + said
    return "\n\n".join(parts) + "\n"
