"""What tests of the language model share: the miniature of every version, its method put back afterwards."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llava.compress import get
from tests.conftest import Loaded

VERSIONS = ["v1.6-vicuna", "v1.6-mistral", "v1.5"]


@pytest.fixture(params=VERSIONS)
def model(request: pytest.FixtureRequest, loaded: Callable[..., Loaded]) -> Iterator[Any]:
    model = loaded(request.param).model
    before, model.method = model.method, get("globalcom2(retention_ratio=0.5)")
    model.processor = loaded(request.param).processor
    yield model
    model.method = before
    del model.processor
