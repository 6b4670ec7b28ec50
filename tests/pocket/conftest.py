"""Fixtures: a tokenizer and an untrained model of the pocket checkpoint's kind, shared; tests must not change them."""

from typing import Any

import pytest

from tests.pocket import tiny


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokenizer."""
    return tiny.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def model(words: Any) -> Any:
    """Model in float32, without compression."""
    return tiny.untrained(len(words))
