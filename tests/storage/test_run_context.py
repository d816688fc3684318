import pickle
from pathlib import Path

from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context, RankSpeed, derive_seed


def test_seeds_depend_on_name_and_seed_and_are_reproducible() -> None:
    assert derive_seed(0, "train.model") == derive_seed(0, "train.model") == 2710698611
    assert len({derive_seed(seed, name) for seed in (0, 1, 2**40) for name in ("a", "b")}) == 6
    assert all(0 <= derive_seed(seed, "a") < 2**32 for seed in range(50))


def test_a_context_reaches_a_child_process_without_what_cannot(tmp_path: Path) -> None:
    context = Context(
        task="pretokenize",
        seed=3,
        device="cpu",
        memory_limit_bytes=0,
        provenance={},
        root=tmp_path,
        state=tmp_path / "state",
        tasks=("pretokenize",),
        members=(),
        name="workflow",
        folder=tmp_path / "partial",
        unfinished=tmp_path / "unfinished",
        digests=ObservedInputs(tmp_path / "digests.json"),
        time_ranks=lambda task, num_steps: (RankSpeed(1, "", 1.0, ()),),
    )
    copy = pickle.loads(pickle.dumps(context))  # noqa: S301
    assert (copy.task, copy.seed, copy.root, copy.tasks) == ("pretokenize", 3, tmp_path, ("pretokenize",))
    assert len(context.time_ranks("train", 4)) == 1
    assert copy.time_ranks("train", 4) == ()
