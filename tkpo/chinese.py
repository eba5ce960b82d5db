"""Chinese words, by jieba. Its dictionary takes a second to load, so that it is loaded where it is first needed."""

import functools
import logging
import warnings
from collections.abc import Callable


@functools.cache
def _cut() -> Callable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1 warns about its own source on newer Pythons
        import jieba
    jieba.setLogLevel(logging.WARNING)  # no "Building prefix dict" on standard error
    return jieba.cut


def cut(text: str) -> list[str]:
    """The words of a text, with everything that stands between them; together they are the text."""
    return list(_cut()(text))
