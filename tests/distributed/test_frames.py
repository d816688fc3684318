import os

import pytest

from mlxflow.distributed import frames


def test_frames_are_cut_from_any_pieces_of_a_stream() -> None:
    sent = [(frames.BEATS, b"one"), (frames.OUTPUT, b""), (frames.ENDED, b"-9")]
    data = b"".join(frames.encode(*one) for one in sent)
    for step in (1, 4, 100):
        decoder = frames.Decoder()
        assert [one for at in range(0, len(data), step) for one in decoder.add(data[at : at + step])] == sent


def test_lines_before_the_frames_are_taken_one_by_one() -> None:
    decoder = frames.Decoder()
    assert decoder.take_line(b"Welcome\nmlx") == b"Welcome"
    assert decoder.take_line(b"flow\n" + frames.encode(frames.WANTED, b"{}")) == b"mlxflow"
    assert decoder.take_line(b"") is None
    assert list(decoder.add(b"")) == [(frames.WANTED, b"{}")]


def test_a_pipe_that_is_full_blocks_no_writer() -> None:
    reading, writing = os.pipe()
    outbox = frames.Outbox(writing)
    outbox.add(frames.encode(frames.CONTENT, b"x" * (1 << 20)))
    assert 0 < len(outbox) < 1 << 20
    received = 0
    while len(outbox):
        received += len(os.read(reading, 1 << 16))
        outbox.flush()
    os.set_blocking(reading, False)
    while received < 5 + (1 << 20):
        received += len(os.read(reading, 1 << 16))
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        outbox.add(b"x")
    os.close(writing)
