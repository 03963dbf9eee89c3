"""The words of an item's text that tell most about it, for reasons such as "both red, wool".

Knows texts. Doesn't know the index.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm4rec_spark.models.ranking.top_k import pad_positions

_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP_WORDS = frozenset(
    _WORD.findall(
        "and are but can for from has have into its made not out per same such than that the "
        "their them then this used using was were which while with you your"
    )
)
_MAX_WORDS = 32


class TellingWords(NamedTuple):
    """table: int32 (texts, words), numbers of each text's words, rarest first, -1 past the last.

    vocabulary: the word of each number, rarest in the catalogue first.
    """

    table: np.ndarray
    vocabulary: list[str]


def telling_words(texts: Sequence[str], frozen: Sequence[str] = ()) -> TellingWords:
    """Number the words of the texts by inverse document frequency, without stop words.

    A long text keeps its rarest words. Words in `frozen` keep their order, after all new ones.
    """
    word_sets = [set(_WORD.findall(text.lower())) - _STOP_WORDS for text in texts]
    frequencies = Counter(word for words in word_sets for word in words)
    new_words = frequencies.keys() - set(frozen)

    def order(word: str) -> tuple[int, str]:
        # With frozen words, a new word's own frequency would change with each version.
        return (0 if frozen else frequencies[word], word)

    vocabulary = [*sorted(new_words, key=order), *frozen]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    rows = [sorted(numbers[word] for word in words)[:_MAX_WORDS] for words in word_sets]
    return TellingWords(pad_positions(rows).astype(np.int32), vocabulary)
