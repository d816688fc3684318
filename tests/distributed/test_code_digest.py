from mlxflow.distributed.code_digest import code_digest


def test_the_digest_is_that_of_the_same_code() -> None:
    first = code_digest()
    code_digest.cache_clear()
    assert code_digest() == first
    assert len(first) == 64
