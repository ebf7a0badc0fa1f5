"""What is read from a request's body, and what is not touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.router.errors import ApiError, openai_form
from kvcached.router.wanted import TOKENS_PER_IMAGE, read, renamed


def tokens(**fields: Any) -> int:
    return read(json.dumps({"model": "m", **fields}).encode()).tokens


def test_how_long_a_prompt_is() -> None:
    assert tokens() == 0
    assert tokens(prompt=[5] * 700) == 700
    assert tokens(prompt=[]) == 0
    assert tokens(prompt="word " * 800) == pytest.approx(1000, rel=0.01)
    assert tokens(input=["word " * 400] * 2) == pytest.approx(1000, rel=0.01)
    assert tokens(prompt=[[1, 2, 3], [4, 5]]) == 5
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}
    assert TOKENS_PER_IMAGE < tokens(messages=[message]) < TOKENS_PER_IMAGE + 60


@pytest.mark.parametrize(("value", "streams"), [(True, True), (False, False), (None, False)])
def test_whether_it_streams(value: object, streams: bool) -> None:
    assert read(json.dumps({"model": "m", "stream": value}).encode()).streams is streams
    assert not read(b'{"model":"m"}').streams
    assert not read(b'{"model":"m","stream":"perhaps"}').streams  # the engine will say something


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values), st.text())
def test_any_object_with_a_model_is_read_and_can_be_renamed(
    fields: dict[str, Any], model: str
) -> None:
    body = json.dumps({**fields, "model": model}).encode()
    wanted = read(body)
    assert wanted.model == model and wanted.tokens >= 0
    assert json.loads(renamed(body, "other/name")) == {**fields, "model": "other/name"}


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        read(body)
    except ApiError as error:
        assert error.status == 400
        json.loads(error.body())


@given(st.binary(), st.sampled_from([400, 404, 422, 500, 503]))
def test_whatever_an_engine_says_becomes_openais_form(body: bytes, status: int) -> None:
    said = json.loads(openai_form("m", "/v1/embeddings", status, body))
    assert isinstance(said["error"], dict)
