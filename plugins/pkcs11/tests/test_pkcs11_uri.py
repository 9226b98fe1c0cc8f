"""PKCS #11 URIs: RFC 7512's own examples, each way to be wrong, and whatever hypothesis thinks of."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

from upcall_pkcs11.uri import MAX_URI, Uri, parse_uri

from upcall.core.errors import PeerError

FULL = (
    "pkcs11:token=lab;manufacturer=me;serial=12ab;model=x;object=files;id=%01%FF"
    "?module-path=/usr/lib/p.so&pin-source=file:/etc/pin"
)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("pkcs11:", Uri()),
        ("pkcs11:object=my-pubkey;type=public", Uri(object="my-pubkey")),  # RFC 7512, 3
        (
            "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;"
            "object=my-certificate;id=%69%95%3E%5C%F4%BD%EC%91;serial=",
            Uri(
                "The Software PKCS#11 Softtoken",
                "Snake Oil, Inc.",
                "",
                "1.0",
                "my-certificate",
                b"\x69\x95\x3e\x5c\xf4\xbd\xec\x91",
            ),
        ),
        ("PKCS11:id=ab%2f&", Uri(id=b"ab/&")),
        ("pkcs11:?", Uri()),
        ("pkcs11:object=a?module-path=/a/b?|:@", Uri(object="a", module_path="/a/b?|:@")),
        ("pkcs11:token=%C3%A9%E2%82%AC", Uri(token="é€")),
        ("pkcs11:?pin-source=file:///etc/pin", Uri(pin_file="/etc/pin")),
        (FULL, Uri("lab", "me", "12ab", "x", "files", b"\x01\xff", "/usr/lib/p.so", "/etc/pin")),
    ],
)
def test_a_sound_uri_is_parsed(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


def test_a_uri_is_printed_in_its_canonical_form() -> None:
    assert str(parse_uri(FULL)) == FULL
    assert str(Uri("a b;", object="é/?&", id=b"a")) == "pkcs11:token=a%20b%3B;object=%C3%A9%2F%3F%26;id=%61"


@pytest.mark.parametrize(
    ("text", "why", "where"),
    [
        ("", "does not begin with pkcs11:", 0),
        ("http:token=a", "does not begin with pkcs11:", 0),
        (" pkcs11:token=a", "does not begin with pkcs11:", 0),
        ("pkcs11:token=a;", "is expected", 15),
        ("pkcs11:;token=a", "is expected", 7),
        ("pkcs11:token", "is expected", 7),
        ("pkcs11:Token=a", "is expected", 7),
        ("pkcs11:x-vendor=a", "is expected", 7),
        ("pkcs11:module-path=/a", "is expected", 7),
        ("pkcs11:?token=a", "is expected", 8),
        ("pkcs11:?module-path=/a&", "is expected", 23),
        ("pkcs11:?pin-value=1234", "pin-value: a PIN would stand in clear", 8),
        ("pkcs11:pin-value=1234", "pin-value: a PIN would stand in clear", 7),
        ("pkcs11:slot-id=1", "slots change", 7),
        ("pkcs11:library-version=1", "named by module-path", 7),
        ("pkcs11:?module-name=p11", "named by module-path", 8),
        ("pkcs11:token=a;token=a", "token is said twice", 15),
        ("pkcs11:token=a%", "two hexadecimal digits", 14),
        ("pkcs11:token=a%4", "two hexadecimal digits", 14),
        ("pkcs11:token=a%4g", "two hexadecimal digits", 14),
        ("pkcs11:token=a%+4", "two hexadecimal digits", 14),
        ("pkcs11:token=a b", "must be written as %XX", 14),
        ("pkcs11:token=é", "must be written as %XX", 13),
        ("pkcs11:token=a/b", "must be written as %XX", 14),
        ("pkcs11:token=a#b", "must be written as %XX", 14),
        ("pkcs11:object=a\n", "must be written as %XX", 15),
        ("pkcs11:token=%FF", "token is not UTF-8", 13),
        ("pkcs11:token=%00", "token holds a NUL", 13),
        ("pkcs11:type=cert", "must be private or public", 12),
        ("pkcs11:?module-path=p.so", "is not absolute", 20),
        ("pkcs11:?module-path=//p.so", "is not absolute", 20),
        ("pkcs11:?module-path=", "is not absolute", 20),
        ("pkcs11:?pin-source=%7Cecho", "must be file:/path", 19),
        ("pkcs11:?pin-source=/etc/pin", "must be file:/path", 19),
        ("pkcs11:?pin-source=file:pin", "is not absolute", 19),
        ("pkcs11:?pin-source=file://host/pin", "is not absolute", 19),
        ("pkcs11:token=" + "a" * MAX_URI, "at most", None),
    ],
)
def test_a_malformed_uri_is_refused_with_the_position(text: str, why: str, where: int | None) -> None:
    with pytest.raises(PeerError, match=re.escape(why)) as caught:
        parse_uri(text)
    assert caught.value.where == where
    assert "1234" not in str(caught.value)


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
paths = words.map(lambda word: "/" + word.lstrip("/"))
maybe_words = st.none() | words


@given(
    st.builds(
        Uri,
        maybe_words,
        maybe_words,
        maybe_words,
        maybe_words,
        maybe_words,
        st.none() | st.binary(max_size=20),
        st.none() | paths,
        st.none() | paths,
    )
)
def test_any_uri_is_parsed_back_as_printed(uri: Uri) -> None:
    text = str(uri)
    assert text.isascii() and text.isprintable()
    if len(text) <= MAX_URI:
        assert parse_uri(text) == uri


WORDS = """token object id type private module-path pin-source file: /a = ; ? & % %41 %00 %c3 %a9 serial= é"""
pieces = st.sampled_from([*WORDS.split(), " "])


@given(st.lists(pieces, max_size=12).map("".join) | st.text(max_size=40))
def test_any_text_is_a_uri_or_a_peer_error(text: str) -> None:
    for whole in (text, "pkcs11:" + text):
        try:
            uri = parse_uri(whole)
        except PeerError:
            continue
        assert parse_uri(str(uri)) == uri
