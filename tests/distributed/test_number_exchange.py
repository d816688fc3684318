import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlxflow.distributed import number_exchange
from mlxflow.distributed.number_exchange import Meeting, NumberExchange
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.rank_start import free_ports
from mlxflow.distributed.team import Team


def _meet(size: int, hub: int) -> list[NumberExchange]:
    """Return the ranks of a run, connected in threads."""
    meeting = Meeting(hub, "127.0.0.1", free_ports(1)[0], "secret")
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda number: NumberExchange(meeting, number, size), range(size)))


@pytest.mark.parametrize("hub", [0, 1, 2])
def test_every_rank_gets_the_numbers_of_all_by_rank(hub: int) -> None:
    teams = [Team(Rank(number, 3, "", "ordered"), None, one) for number, one in enumerate(_meet(3, hub))]
    for team in teams:
        team._group = object()  # type: ignore[assignment]  # of ranks that are connected
    with ThreadPoolExecutor(3) as threads:
        for value in range(20):
            mine = [[value, team.rank.number] for team in teams]
            rows = list(threads.map(lambda team, own: team.exchange("test", own), teams, mine))
            assert all(np.array_equal(row, [[value, 0], [value, 1], [value, 2]]) for row in rows)


def test_a_lost_rank_is_an_error_of_all_others() -> None:
    hub, other = _meet(2, 0)
    (connection,) = other._peers.values()
    connection.close()
    with pytest.raises(RuntimeError, match=r"^\[exchange\] connection to another rank was lost \(EOFError\)$"):
        hub.gather(b"1234")


def test_a_process_without_the_key_is_refused() -> None:
    meeting = Meeting(0, "127.0.0.1", free_ports(1)[0], "secret")
    errors: list[OSError] = []

    def join(number: int, key: str) -> None:
        try:
            NumberExchange(meeting._replace(key=key), number, 2)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=join, args=args) for args in ((0, "secret"), (1, "guessed"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2


def test_a_hub_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_exchange, "_JOIN_SECONDS", 0.0)
    with pytest.raises(ConnectionRefusedError):
        NumberExchange(Meeting(0, "127.0.0.1", free_ports(1)[0], "secret"), 1, 2)
