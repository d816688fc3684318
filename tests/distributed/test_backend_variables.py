import json

import pytest

from mlxflow.distributed.backend_variables import variables_of, visible_gpu
from mlxflow.distributed.number_exchange import Meeting

ADDRESSES = [["10.0.0.1:7001", "10.0.1.1:7002"], ["10.0.0.2:7003", "10.0.1.2:7004"]]
RDMA = [(None, "rdma_en2"), (["rdma_en2", "rdma_en3"], None)]


def test_ring_gets_the_addresses_of_all_ranks() -> None:
    values, files = variables_of("ring", 1, ADDRESSES, rdma=(), key="k")
    assert values == {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}
    assert {name: json.loads(content) for name, content in files.items()} == {"MLX_HOSTFILE": ADDRESSES}


def test_nccl_gets_the_first_address_of_rank_0() -> None:
    values, files = variables_of("nccl", 1, [["fe80::1:7001"], []], rdma=(), key="k")
    assert values == {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "fe80::1", "NCCL_PORT": "7001"}
    assert files == {"MLXFLOW_MEETING": Meeting(0, "fe80::1", 7002, "k").write()}
    _, files = variables_of("nccl", 0, ADDRESSES, rdma=(), key="k")
    host, _, port = ADDRESSES[1][0].rpartition(":")
    assert Meeting.read(files["MLXFLOW_MEETING"]) == Meeting(1, host, int(port), "k")


def test_jaccl_gets_its_coordinator_and_devices() -> None:
    values, files = variables_of("jaccl", 0, ADDRESSES, rdma=RDMA, key="k")
    assert values == {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "MLX_JACCL_COORDINATOR": "10.0.0.1:7001"}
    assert {name: json.loads(content) for name, content in files.items()} == {
        "MLX_IBV_DEVICES": [[None, "rdma_en2"], [["rdma_en2", "rdma_en3"], None]]
    }


def test_a_rank_gets_a_gpu_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpu(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible_gpu(1) == "6"
