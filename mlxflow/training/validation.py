"""Validations of a training run, the best weights so far, and early stopping."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.distributed.team import SOLO, Team
from mlxflow.evaluation.perplexity import part_losses, perplexity_from
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.recorder import Recorder
from mlxflow.training.run_state import RunState
from mlxflow.training.settings import TrainingSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Validator:
    """Measures a model in training on validation rows.

    Args:
        model: in training.
        rows: of validation.
        settings: of the training.
        state: of the run; its losses are kept up to date.
        recorder: writes the records.
        checkpoints: stores the best weights, if the settings ask for them.
        team: the ranks of a distributed run, which share the rows.
        stop_requested: whether a signal asks this process to end the run; checked between forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        settings: TrainingSettings,
        *,
        state: RunState,
        recorder: Recorder,
        checkpoints: CheckpointStore,
        team: Team = SOLO,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._rows = rows
        self._settings = settings
        self._state = state
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._team = team
        self._stop_requested = stop_requested

    def _losses(self) -> "NDArray[np.float64] | None":
        """Return the losses of all target tokens, in their order; each rank measures some of the rows.

        Returns:
            None if a signal asks any rank to end the run: then some of the rows were not measured.
        """
        team, settings = self._team, self._settings
        stops = False

        def is_own(part: int) -> bool:
            nonlocal stops
            team.beat("validation")
            stops = stops or (self._state.step > 0 and self._stop_requested())  # before step 1 nothing is lost
            return part % team.size == team.rank.number and not stops

        own = part_losses(
            self._model,
            self._rows,
            batch_size=settings.batch_size,
            masks_documents=settings.masks_documents,
            is_wanted=is_own,
        )
        if team.exchange("end of a validation", [int(stops)]).any():
            return None
        return np.concatenate([np.empty(0), *team.take_turns(own)])

    def validate(self) -> bool:
        """Measure the loss on the validation rows; random state and model stay unchanged.

        Returns:
            whether it was measured; False if a signal asks to end the run.
        """
        state, settings = self._state, self._settings
        losses = self._losses()
        if losses is None:
            return False
        measured = perplexity_from(losses)
        self._recorder.write(
            {"kind": "validation", "step": state.step, "loss": measured.loss, "perplexity": measured.perplexity}
        )
        if state.step == 0:
            state.first_loss = measured.loss
        state.last_loss = measured.loss
        if not measured.loss >= state.best_loss:
            state.best_loss, state.best_step, state.validations_since_best = measured.loss, state.step, 0
            if settings.keep == "best":
                weights = dict(tree_flatten(self._model.trainable_parameters()))
                self._checkpoints.save_best(state.step, weights)
        else:
            state.validations_since_best += 1
            state.ended_early = bool(settings.patience) and state.validations_since_best >= settings.patience
        return True
