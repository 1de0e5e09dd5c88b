"""Schemas and the handshake's messages: what goes in comes out, what is not valid is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import ProtocolError, SchemaMismatch, TransportError
from transport.handshake_messages import (
    MAGIC,
    MAX_CONTROL_BYTES,
    NO_EPOCH,
    PROTOCOL_VERSION,
    Hello,
    Opcode,
    ShmOffer,
    decode_body,
    decode_prefix,
    encode,
)
from transport.schema import (
    ALIGNMENT,
    DTYPES,
    MAX_ARRAYS,
    MAX_MESSAGE_BYTES,
    ArraySpec,
    Schema,
)

specs = st.builds(
    ArraySpec,
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20).filter(
        lambda name: not name.endswith("/used")  # means a length, which has rules of its own
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
)
schemas = st.lists(specs, max_size=8, unique_by=lambda spec: spec.name).map(
    lambda several: Schema(tuple(several))
)


@given(schemas)
def test_a_schema_survives_json(schema: Schema) -> None:
    assert Schema.from_json(schema.to_json()) == schema
    assert hash(Schema.from_json(schema.to_json())) == hash(schema)


@given(schemas)
def test_arrays_are_aligned_and_do_not_overlap(schema: Schema) -> None:
    end = 0
    for name, spec in schema.specs.items():
        assert schema.offsets[name] % ALIGNMENT == 0
        assert schema.offsets[name] >= end
        end = schema.offsets[name] + spec.nbytes
    assert schema.nbytes == end


@given(schemas, st.binary(max_size=8))
def test_views_are_the_buffer(schema: Schema, seed: bytes) -> None:
    buffer = np.zeros(schema.nbytes + 1, np.uint8)
    writable = schema.views(buffer, writable=True)
    for number, view in enumerate(writable.values()):
        view[...] = number + len(seed)
    schema.check(writable)
    for number, view in enumerate(schema.views(buffer).values()):
        assert (view == number + len(seed)).all()
        assert not view.flags.writeable


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (("", "uint8", (1,)), "name"),
        (("a\n", "uint8", (1,)), "name"),
        (("a" * 200, "uint8", (1,)), "name"),
        (("a", "float16", (1,)), "a: got dtype 'float16', expected one of"),
        (("a", "uint8", (0,)), r"a: got shape \(0,\)"),
        (("a", "uint8", (1,) * 9), "a: got shape"),
        (("a", "uint8", (MAX_MESSAGE_BYTES + 1,)), "a: got .* bytes"),
    ],
)
def test_a_spec_out_of_bounds_is_named(spec, text: str) -> None:
    with pytest.raises(SchemaMismatch, match=text):
        ArraySpec(*spec)


def test_a_schema_out_of_bounds_is_named() -> None:
    one = ArraySpec("a", "uint8", (1,))
    with pytest.raises(SchemaMismatch, match="different names"):
        Schema((one, one))
    with pytest.raises(SchemaMismatch, match="arrays"):
        Schema(tuple(ArraySpec(f"a{n}", "uint8", (1,)) for n in range(MAX_ARRAYS + 1)))
    half = MAX_MESSAGE_BYTES // 2 + 1
    with pytest.raises(SchemaMismatch, match="bytes"):
        Schema((ArraySpec("a", "uint8", (half,)), ArraySpec("b", "uint8", (half,))))


def test_array_of_another_dtype_may_have_a_used_suffix() -> None:
    picture = ArraySpec("images/used", "uint8", (4, 4, 3))
    above = ArraySpec("images", "uint8", (4,))
    for specs in ((picture,), (above, picture), (picture, above)):
        schema = Schema(specs)
        assert schema.tail is None
        assert schema.length(schema.views(bytearray(schema.nbytes))) == schema.nbytes
    tail = (picture, ArraySpec("jpeg/used", "int64", ()), ArraySpec("jpeg", "uint8", (9,)))
    assert Schema(tail).tail == "jpeg"


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_no_bytes_break_the_schema_parser(text) -> None:
    try:
        Schema.from_json(text)
    except (ProtocolError, SchemaMismatch):
        return


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(json_values)
def test_no_json_breaks_the_parsers(value) -> None:
    """Whatever a peer sends is parsed or refused; nothing else is raised."""
    text = json.dumps(value)
    for parse in (
        lambda: Schema.from_json(text),
        lambda: Hello.from_body(decode_body(text.encode())),
        lambda: ShmOffer.from_body(decode_body(text.encode())),
        lambda: ShmOffer.from_body({"names": value, "sizes": value, "socket": value}),
    ):
        try:
            parse()
        except (ProtocolError, SchemaMismatch):
            continue


printable = st.text(max_size=50).filter(str.isprintable)


@given(schemas, printable, st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_hello_survives_the_wire(schema: Schema, client: str, attributes) -> None:
    hello = Hello(client, schema, ("shm", "zmq"), attributes)
    head, text = encode(Opcode.HELLO, b"e" * 16, hello.to_body())
    assert decode_prefix(head) == (PROTOCOL_VERSION, Opcode.HELLO, b"e" * 16)
    assert Hello.from_body(decode_body(text)) == hello


@pytest.mark.parametrize("client", ["\x1b[2J", "a\nb", "\ud800", "x" * 1000])
def test_a_name_that_would_harm_a_terminal_or_a_log_is_refused(client: str) -> None:
    body = Hello("arm", Schema(()), ("zmq",)).to_body()
    with pytest.raises(ProtocolError, match="client: got"):
        Hello.from_body({**body, "client": client})


@pytest.mark.parametrize("name", ["/a\ud800", "/ä"])
def test_segment_names_must_be_ascii(name: str) -> None:
    body = ShmOffer(("/a", "/b"), (1, 2), "socket").to_body()
    for changed in ({"names": [name, "/b"]}, {"socket": name}):
        with pytest.raises(ProtocolError, match="offer: got"):
            ShmOffer.from_body({**body, **changed})


def test_an_offer_survives_the_wire() -> None:
    offer = ShmOffer(("/a", "/b"), (1, 2), "socket")
    _, text = encode(Opcode.WELCOME, NO_EPOCH, offer.to_body())
    assert ShmOffer.from_body(decode_body(text)) == offer


@given(st.binary(max_size=64))
def test_invalid_prefix_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        decode_prefix(b"x" + data)
    with pytest.raises(ProtocolError, match="expected"):
        decode_prefix((MAGIC + data)[:23])


def test_our_own_messages_are_bounded_too() -> None:
    with pytest.raises(TransportError, match=r"DESCRIPTION: got .* bytes of JSON"):
        encode(Opcode.DESCRIPTION, NO_EPOCH, {"a": "x" * MAX_CONTROL_BYTES})
    with pytest.raises(TransportError, match="DESCRIPTION: its body is not JSON"):
        encode(Opcode.DESCRIPTION, NO_EPOCH, {"a": np.zeros(1)})
