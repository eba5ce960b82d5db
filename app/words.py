"""Words of the page in its two languages, kept apart from where they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tkpo.attributes import Axis
from tkpo.methods import METHODS

UI_LANGUAGES = {"en": "English", "zh": "中文"}
HTML_LANGUAGES = {"en": "en", "zh": "zh-CN"}  # values of the `lang` attribute

Table = Mapping[str, Mapping[str, str]]  # page language → key → words


class Words:
    """The word tables of the page's parts put together, with names for styles that no table knows.

    tables: page language → key → words; every table has all of `UI_LANGUAGES`, with the same keys.
    axes: style → its axis; styles without words in the tables are named after their phrases.
    """

    def __init__(self, tables: Iterable[Table], axes: Mapping[str, Axis] | None = None):
        self.tables = {ui: {key: words for table in tables for key, words in table[ui].items()} for ui in UI_LANGUAGES}
        for ui, contrast in (("en", "Not {other}"), ("zh", "与“{other}”相对")):
            for style, axis in (axes or {}).items():
                name, other = (axis.phrases[s].get(ui) or s for s in (style, axis.flip[style]))
                self.tables[ui].setdefault(f"name_{style}", name)
                self.tables[ui].setdefault(
                    f"style_{style}", f"{name[:1].upper()}{name[1:]}\n{contrast.format(other=other)}"
                )

    def say(self, ui: str) -> Say:
        return Say(ui if ui in UI_LANGUAGES else "en", self.tables[ui if ui in UI_LANGUAGES else "en"])


class Say:
    """The words of one page language: `say(key, **values)`."""

    def __init__(self, ui: str, table: Mapping[str, str]):
        self.ui = ui
        self.html_lang = HTML_LANGUAGES[ui]
        self._table = table

    def __call__(self, key: str, **values) -> str:
        """The words for `key`, with its slots filled."""
        words = self._table[key]
        return words.format(**values) if values else words

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def method(self, name: str) -> str:
        """The method's label; an adapter of no known method is called by its own name."""
        if f"method_{name}" in self:
            return self(f"method_{name}")
        return METHODS[name].label if name in METHODS else name
