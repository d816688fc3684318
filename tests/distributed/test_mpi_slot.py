import json
import os
import socket
import subprocess
import sys

from mlxflow.distributed import mpi_slot


def test_a_slot_sends_its_variables_of_open_mpi_and_ends_with_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = {"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OTHER": "x"}
        place = {mpi_slot.VARIABLE: f"127.0.0.1 {server.getsockname()[1]} secret"}
        process = subprocess.Popen([sys.executable, "-I", "-S", mpi_slot.__file__], env=os.environ | variables | place)
        with server.accept()[0] as link:
            assert json.loads(link.makefile().readline()) == ["secret", {"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}]
            assert process.poll() is None
        assert process.wait(30) == 0
