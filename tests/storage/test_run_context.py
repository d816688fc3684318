from mlxflow.storage.run_context import derive_seed


def test_seeds_depend_on_name_and_seed_and_are_reproducible() -> None:
    assert derive_seed(0, "train.model") == derive_seed(0, "train.model") == 2710698611
    assert len({derive_seed(seed, name) for seed in (0, 1, 2**40) for name in ("a", "b")}) == 6
    assert all(0 <= derive_seed(seed, "a") < 2**32 for seed in range(50))
