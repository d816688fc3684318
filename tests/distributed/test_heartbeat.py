import os

from mlxflow.distributed.heartbeat import Beat, Failure, Heart, read_message


def test_a_supervisor_reads_what_a_rank_sends() -> None:
    reading, writing = os.pipe()
    heart = Heart(writing)
    heart.beat(3, "forward pass")
    heart.beat(3, "check", waits=True)
    heart.beat(9, "end", is_done=True)
    heart.fail("refused", "one\ntwo", 2)
    os.close(writing)
    lines = os.read(reading, 1 << 16).splitlines()
    os.close(reading)
    assert [read_message(line) for line in lines] == [
        Beat(3, "forward pass"),
        Beat(3, "check", waits=True),
        Beat(9, "end", is_done=True),
        Failure("refused", ("one", "two"), 2),
    ]
    assert read_message(lines[0][:-3]) is None


def test_a_rank_whose_supervisor_reads_nothing_goes_on() -> None:
    reading, writing = os.pipe()
    heart = Heart(writing)
    for step in range(10_000):
        heart.beat(step, "forward pass")
    os.close(reading)
    heart.beat(0, "forward pass")
    os.close(writing)


def test_a_single_process_sends_nothing() -> None:
    Heart(-1).beat(1, "forward pass")
    Heart(-1).fail("error", "x", 1)
