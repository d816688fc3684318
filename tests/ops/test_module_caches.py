import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.module_caches import restored_caches


class Caching(nn.Module):  # type: ignore[misc]
    """Keeps what it derives from its weight, as the norm of mlx-lm's plamo3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.ones(4)
        self._scale: mx.array | None = None
        self._of: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self._of is not self.weight:
            self._scale, self._of = self.weight + 1, self.weight
            self._new = self.weight * 2
        scale = self._scale
        assert scale is not None
        return x * scale


def test_what_was_kept_before_is_restored() -> None:
    module = Caching()
    with restored_caches(module):
        module(mx.ones(4))
        assert "_scale" in module
    assert module._scale is None
    assert not hasattr(module, "_new")
    module(mx.ones(4))
    scale = module._scale
    with restored_caches(module):
        module.weight = module.weight * 2
        module(mx.ones(4))
        assert module._scale is not scale
    assert module._scale is scale
