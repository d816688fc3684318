"""A process that `mpirun` starts for each rank: it sends the variables of its slot to the supervisor and waits.

Its text is passed to Python, so that another host needs no copy. It ends with the connection to the supervisor.
"""

import json
import os
import socket

#: The environment variable with address and port of the supervisor and a secret.
VARIABLE = "MLXFLOW_MPI_SLOT"

#: How the names of Open MPI's variables begin.
PREFIXES = ("OMPI_", "OPAL_", "ORTE_", "PMIX_", "PRTE_")


def main() -> None:
    """Send the variables and wait."""
    address, port, key = os.environ[VARIABLE].split(" ")
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    with socket.create_connection((address, int(port))) as link:
        link.sendall(json.dumps([key, variables]).encode() + b"\n")
        link.recv(1)


if __name__ == "__main__":
    main()
