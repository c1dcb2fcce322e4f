"""Flat configs: what differs, what is free, and that no password is kept."""

import pytest

from framework.mapping import differences, is_below, mask_url, masked


def test_differences_name_their_keys() -> None:
    there, here = {"a.b": 1, "a.c": 2, "ab": 3}, {"a.b": 2, "a.c": 2, "ab": 4}
    assert differences(there, here) == ["a.b: 1 there, 2 here", "ab: 3 there, 4 here"]
    assert differences(there, here, ["a"]) == ["ab: 3 there, 4 here"]
    assert is_below("a", ["a"])
    assert not is_below("ab", ["a"])


@pytest.mark.parametrize(
    "password", ["secret", "p@ss", "p/w", "p:w", "a@b@c", "s3cr3t!", "%40%2F", "x#y?z"]
)
def test_a_password_in_a_url_is_masked(password: str) -> None:
    url = f"postgresql://user:{password}@host:5432/db"
    assert mask_url(url) == "postgresql://user:***@host:5432/db"
    assert mask_url(f"see {url}, please") == "see postgresql://user:***@host:5432/db, please"
    assert masked({"uri": [url]}) == {"uri": ["postgresql://user:***@host:5432/db"]}


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a@b", "file:///a:b@c", "http://mlflow:5000", "/plain/path", "sqlite:///x.db"],
)
def test_other_urls_stay(url: str) -> None:
    assert mask_url(url) == url


def test_fields_and_options_named_for_a_secret_are_masked() -> None:
    assert mask_url("http://h/x?user=a&password=b&y=1") == "http://h/x?user=a&password=***&y=1"
    signed = "https://b/x?X-Amz-Signature=a1&access_token=b2&apikey=c3&tokens=4"
    assert mask_url(signed) == (
        "https://b/x?X-Amz-Signature=***&access_token=***&apikey=***&tokens=4"
    )
    assert mask_url("https://t0ken@mlflow.example/x@y") == "https://***@mlflow.example/x@y"
    hidden = {"servers": [{"secret_key": "a", "port": 1}]}
    assert masked(hidden) == {"servers": [{"secret_key": "***", "port": 1}]}
    flat = {"a.password": "x", "a.api_key": "x", "token": "x", "data.max_tokens": 3, "b.token": ""}
    kept = {"a.password": "***", "a.api_key": "***", "token": "***", "data.max_tokens": 3}
    assert masked(flat) == {**kept, "b.token": ""}
