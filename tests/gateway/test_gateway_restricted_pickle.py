"""Foreign pickles: plain data and arrays come back, everything else is refused."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from policies.checkpoint.safe_pickle_types import ALLOWED_FUNCTIONS
from policies.types import ActionChunk
from runtime.gateway import restricted_pickle
from runtime.gateway.ilstudio.chunk_pickle import NO_ACTIONS, ChunkWriter
from runtime.gateway.restricted_pickle import RecordClass, read_pickle
from tests.gateway.ilstudio_messages import dumps, meta_obs

RECORDS = {("benchmark.base", "MetaObs"): RecordClass("MetaObs")}
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = (
    npst.integer_dtypes(endianness="?")
    | npst.unsigned_integer_dtypes(endianness="?")
    | npst.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | npst.boolean_dtypes()
)


def read(content: bytes) -> Any:
    return read_pickle(content, RECORDS)


def refused(content: bytes) -> str:
    with pytest.raises(pickle.UnpicklingError) as caught:
        read(content)
    return str(caught.value)


@given(PLAIN, st.sampled_from((3, 4, 5)))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@given(npst.arrays(NUMBERS, npst.array_shapes(min_dims=0, min_side=0)), st.sampled_from((3, 4, 5)))
def test_arrays_come_back(array: np.ndarray, protocol: int) -> None:
    for turned in (array, array.T):
        got = read(pickle.dumps([turned, turned], protocol))[1]
        assert (got.dtype, got.shape) == (turned.dtype, turned.shape)
        assert got.tobytes() == turned.tobytes()


@given(
    st.integers(1, 4),
    npst.array_shapes(min_dims=2, max_dims=2, max_side=9),
    st.sampled_from([("joint", "abs", "abs"), ("ee", "delta", "delta"), ("ee", "relative", "rel")]),
    st.booleans(),
    st.data(),
)
def test_chunks_are_written_as_their_reader_expects(
    rows: int,
    shape: tuple[int, int],
    control: tuple[Any, Any, str],
    gripper: bool,
    data: st.DataObject,
) -> None:
    space, ctrl_type, name = control
    arrays = data.draw(npst.arrays(np.float32, (rows, *shape)))
    chunks = [
        ActionChunk(a, ctrl_space=space, ctrl_type=ctrl_type, gripper_continuous=gripper)
        for a in arrays
    ]
    writer = ChunkWriter()
    writer.write([ActionChunk(a + 1, ctrl_space=space, ctrl_type=ctrl_type) for a in arrays])
    content = bytes(writer.write(chunks))
    assert b"_core" not in content  # which only numpy 2 has
    steps = pickle.loads(content)
    assert len(steps) == shape[0]
    for at, step in enumerate(steps):
        assert (type(step), step.shape, step.dtype) == (np.ndarray, (rows,), object)
        for row, action in zip(arrays, step, strict=True):
            assert list(action) == ["ctrl_space", "ctrl_type", "action", "gripper_continuous"]
            assert action["action"].dtype == np.float32
            assert action["action"].tobytes() == row[at].tobytes()
            assert (action["ctrl_space"], action["ctrl_type"]) == (space, name)
            assert action["gripper_continuous"] is gripper


def test_an_error_is_an_empty_list() -> None:
    assert pickle.loads(NO_ACTIONS) == []


def test_rows_of_different_sizes_are_not_written() -> None:
    chunks = [ActionChunk(np.zeros((steps, 2), np.float32)) for steps in (3, 4)]
    with pytest.raises(ValueError, match=r"got shape \(4, 2\), expected \(3, 2\)"):
        ChunkWriter().write(chunks)
    chunks[1] = ActionChunk(np.zeros((3, 2), np.float32), ctrl_type="delta")
    with pytest.raises(ValueError, match=r"got .*delta.*, expected .*abs"):
        ChunkWriter().write(chunks)


def test_few_sizes_of_chunks_are_kept() -> None:
    writer = ChunkWriter()
    for steps in range(1, 100):
        writer.write([ActionChunk(np.zeros((steps, 2), np.float32))])
    assert len(writer._templates) == 16


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("numpy", [b"numpy._core", b"numpy.core"])
def test_observations_come_back(protocol: int, numpy: bytes) -> None:
    obs = meta_obs(rows=2)
    content = dumps(obs, protocol)
    if protocol == 3:
        content = content.replace(b"numpy._core", numpy)
    else:  # the length of the text comes before it
        for name in (b".multiarray", b".numeric"):
            old, new = b"numpy._core" + name, numpy + name
            content = content.replace(
                b"\x8c" + bytes((len(old),)) + old, b"\x8c" + bytes((len(new),)) + new
            )
    assert numpy in content
    got = read(content)
    assert got.name == "MetaObs" and set(got.fields) == set(vars(obs))
    assert np.array_equal(got.fields["image"], obs.image)
    assert np.array_equal(got.fields["timestep"], obs.timestep)
    assert got.fields["raw_lang"] == obs.raw_lang and got.fields["depth"] is None


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pictures_are_not_copied(protocol: int) -> None:
    content = bytearray(dumps(meta_obs(), protocol))
    image = read_pickle(memoryview(content), RECORDS).fields["image"]
    assert np.shares_memory(image, np.frombuffer(content, np.uint8))
    assert not image.flags.writeable


def test_a_content_that_is_repeated_is_one_content() -> None:
    content = b"\x80\x04](B" + (10**6).to_bytes(4, "little") + bytes(10**6) + b"\x94"
    got = read(content + b"h\x00" * 9_000 + b"e.")
    assert len(got) == 9_001 and len(got[0]) == 10**6
    assert all(one is got[0] for one in got)


class Gadget:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_command_is_refused_before_it_runs(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "owned"
    content = dumps(
        meta_obs(raw_lang=Gadget(os.system, f"touch {witness}"), state=0, image=0), protocol
    )
    assert "it asks for posix.system" in refused(content)
    assert not witness.exists()


@pytest.mark.parametrize(
    "gadget",
    [
        Gadget(eval, "1"),
        Gadget(getattr, "x", "upper"),
        Gadget(__import__, "os"),
        Gadget(collections.Counter),
        Gadget(np.load, "x.npy"),
        np.array([object()]),
        np.array(["x"]),
        np.zeros(1, [("a", "f8")]),
        {1, 2},
        1j,
        os.system,
    ],
    ids=lambda gadget: repr(gadget)[:20] if not isinstance(gadget, Gadget) else gadget.call[0],
)
def test_other_names_and_objects_are_refused(gadget: Any) -> None:
    said = refused(pickle.dumps(gadget))
    assert any(part in said for part in ("it asks for ", "the dtype", "the instruction"))


def text(value: str) -> bytes:
    return b"\x8c" + bytes((len(value),)) + value.encode()


META_OBS = text("benchmark.base") + text("MetaObs") + b"\x93"
RECONSTRUCT = text("numpy.core.multiarray") + text("_reconstruct") + b"\x93"
DTYPE = text("numpy") + text("dtype") + b"\x93"
NUMBER = DTYPE + b"(" + text("f8") + b"tR"
FROMBUFFER = text("numpy.core.numeric") + text("_frombuffer") + b"\x93"
DOUBLED = b"N" + b"".join(b"\x94h" + bytes((at,)) + b"\x86" for at in range(60))
"""A tuple of 2**60 Nones, in which every level is one tuple twice."""


def array(code: str, content: bytes, count: int) -> bytes:
    """A call that makes an array (count,)."""
    made = FROMBUFFER + b"(" + content + DTYPE + text(code) + b"\x85R"
    return made + b"J" + count.to_bytes(4, "little") + b"\x85" + text("C") + b"tR"


SHARED = b"B" + (60_000).to_bytes(4, "little") + bytes(60_000) + b"\x940"
LAUGHS: list[Any] = [["x"] * 10]
for _ in range(8):
    LAUGHS.append([LAUGHS[-1]] * 10)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Instructions that call, look up or change
        (META_OBS + b")R", "it calls a RecordClass"),
        (META_OBS + b"K\x01\x85\x81", "it makes a RecordClass"),
        (META_OBS + b")}\x92", r"the instruction b'\x92'"),
        (DTYPE + b")\x81", "it makes a AllowedFunction"),
        (b"(" + META_OBS + b"o", "the instruction b'o'"),
        (b"(ios\nsystem\n", "the instruction b'i'"),
        (META_OBS + b"}" + text("__class__") + b"K\x01sb", "it changes a RecordClass"),
        (DTYPE + b"}b", "it changes a AllowedFunction"),
        (b"]}b", "it changes a list"),
        (META_OBS + b")\x81N}\x86b", "it has a MetaObs with the state"),
        (NUMBER + b"}b", "it has a f8 with the state"),
        (b"\x82\x01", r"the instruction b'\x82'"),
        (b"\x83\x01\x00", r"the instruction b'\x83'"),
        (b"\x84\x01\x00\x00\x00", r"the instruction b'\x84'"),
        (b"Pid\n", "the instruction b'P'"),
        (b"K\x01Q", "the instruction b'Q'"),
        (b"\x97", r"the instruction b'\x97'"),
        (b"cos\nsystem\n", "it asks for os.system"),
        (b"cbuiltins\ngetattr\n", "it asks for builtins.getattr"),
        (b"I" + b"9" * 1000 + b"\n", "the instruction b'I'"),
        (DTYPE + text("O8") + b"\x85R", "the dtype 'O8'"),
        (b"cnumpy\nndarray.__class__\n", "it asks for numpy.ndarray.__class__"),
        (text("numpy") + b"K\x01\x93", "it asks for numpy.1"),
        (text("\n2026 forged") + text("\x1b[2J") + b"\x93", r"for '\n2026 forged.\x1b[2J'"),
        (b"K\x01)R", "it calls a int"),
        (RECONSTRUCT + b"K\x01R", "it calls a AllowedFunction"),
        (RECONSTRUCT + META_OBS + b"K\x00\x85C\x01b\x87R", "a subclass of numpy's arrays"),
        (
            RECONSTRUCT + text("numpy") + text("ndarray") + b"\x93K\x00\x85C\x01b\x87R",
            "without content",
        ),
        (META_OBS, "it holds a RecordClass"),
        # Too much
        (pickle.dumps(LAUGHS)[2:-1], "over 20000 values"),
        (b"]" * 1000 + b"a" * 999, "or 32 levels"),
        (b"]\x94h\x00a", "or 32 levels"),
        (b"N0" * 10_001, "more than 20000 instructions"),
        (b")" + b"\x85" * 19_000 + b"}h\x00", "no memo 0"),
        (b"})" + b"\x85" * 15_000 + b"K\x01s", "a tuple for a key"),
        (b"}" + META_OBS + b")\x81K\x01s", "a SafeRecord for a key"),
        (b"}" + DOUBLED + b"Ns", "a tuple for a key"),
        (b"}(" + text("a") + b"N" + DOUBLED + b"Nu", "a tuple for a key"),
        (META_OBS + b")\x81}" + DOUBLED + b"Nsb", "a tuple for a key"),
        (b"}K\x01Ns", "a int for a key"),
        (DTYPE + DOUBLED + b"\x85R", "it has the dtype"),
        (
            FROMBUFFER
            + b"(C\x01a"
            + DTYPE
            + text("u1")
            + b"\x85RK\x01\x85"
            + text("K")
            + DOUBLED
            + DOUBLED
            + b"\x86tR",
            "axes are no permutation",
        ),
        (array("u1", b"C\x01a", 2**30), "in 1 bytes"),
        (SHARED + array("b1", b"h\x00", 60_000) * 3, "many arrays of the same bytes"),
        (SHARED + array("f8", b"h\x00", 7_500) * 3, "many arrays of the same bytes"),
        (
            SHARED
            + NUMBER
            + b"q\x010"
            + (
                RECONSTRUCT
                + text("numpy")
                + text("ndarray")
                + b"\x93K\x00\x85C\x01b\x87R"
                + b"(K\x01J"
                + (7_500).to_bytes(4, "little")
                + b"\x85h\x01\x89h\x00tb"
            )
            * 3,
            "many arrays of the same bytes",
        ),
        (b"Nr\xff\xff\xff\xff", ""),
        (b"B\xff\xff\xff\xffx", "it ends too early"),
        (b"\x8e" + b"\xff" * 8, "it ends too early"),
        (b"\x8d" + b"\xff" * 7 + b"\x7f", "it ends too early"),
        (b"\x96" + b"\0\0\0\x40\0\0\0\0", "it ends too early"),
        (b"\x8a\x0a" + bytes(10), "a number of 80 bits"),
        (b"\x8b\xff\xff\xff\x7f", r"the instruction b'\x8b'"),
        # Damage
        (b"", "it goes on after its end"),
        (b"NN", "it goes on after its end"),
        (b"N.N", "it goes on after its end"),
        (b"0", "it is damaged"),
        (b"(0", "it uses a mark as a value"),
        (b"(\x85", "it takes more values than it has"),
        (b"\x86", "it takes more values than it has"),
        (b"t", "it has no mark"),
        (b"Na", "it has no list to add to"),
        (b"N(u", "it has no dict to add to"),
        (b"}(Nu", "it is damaged"),
        # The length of a frame is nothing.
        (b"\x95" + b"\xff" * 8 + b"\x82", r"the instruction b'\x82'"),
        (b"\x8c\x01\xff", "it is damaged"),
        (b"\x8c\x03\xed\xa0\x80", "it is damaged"),  # half of a surrogate pair
        (b"\x80\x06", "it has protocol 6"),
        (b"\x80\x01", "it has protocol 1"),
        (b"cnumpy", "a name without an end"),
    ],
)
def test_hostile_pickles_are_refused(content: bytes, message: str) -> None:
    if not message:  # a memo's index costs nothing
        assert read(b"\x80\x04" + content + b".") is None
        return
    said = refused(b"\x80\x04" + content + b".")
    assert message in said and said.isprintable()


def test_two_arrays_may_share_their_bytes() -> None:
    one, two = read(b"\x80\x04" + SHARED + array("f8", b"h\x00", 7_500) * 2 + b"\x86.")
    assert np.shares_memory(one, two)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", [META_OBS + b")\x81", NUMBER])
def test_a_state_whose_text_would_fill_the_memory(target: bytes) -> None:
    assert len(refused(b"\x80\x04" + target + DOUBLED + b"b.")) < 300


def test_every_other_instruction_is_refused() -> None:
    known = restricted_pickle._STEPS.keys() | {ord(".")}
    others = {ord(opcode.code) for opcode in pickletools.opcodes} - known
    names = {opcode.name for opcode in pickletools.opcodes if ord(opcode.code) in others}
    assert names >= {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    for code in others | set(range(256)) - known:
        assert "it has the instruction" in refused(b"\x80\x04(NN" + bytes((code,)) + bytes(9))


def test_the_names_that_can_be_asked_for() -> None:
    assert {f"{module}.{name}" for module, name in ALLOWED_FUNCTIONS} == {
        "numpy.dtype",
        "numpy.ndarray",
        *(
            f"numpy.{core}.{name}"
            for core in ("core", "_core")
            for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
        ),
    }


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_message_that_was_cut_is_refused(protocol: int) -> None:
    content = dumps(meta_obs(image=np.zeros((1, 1, 3, 2, 2), np.uint8)), protocol)
    assert read(content).name == "MetaObs"
    for end in range(len(content)):
        refused(content[:end])
