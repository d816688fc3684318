from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_code, model_folder
from mlxflow.ops import mlx_lm_import
from tests.models.test_model_folder import TEXT

#: Modules of mlx-lm that are no architecture, a module within one, and what is no name of a module.
NO_ARCHITECTURES = ("base", "cache", "switch_layers", "pipeline", "llama.nn", ".llama", "../llama", "os", "")


@pytest.mark.parametrize("name", [*NO_ARCHITECTURES, ["llama"], None, 3])
def test_a_model_type_names_an_architecture_and_no_other_module(name: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        model_folder.skeleton(TEXT | {"model_type": name})
    assert str(caught.value) == (
        f"config.json: no architecture that mlx-lm knows (Model type {name} not supported.). Name another model."
    )


def test_every_architecture_of_mlx_lm_is_recognized() -> None:
    utils = mlx_lm_import.mlx_lm_utils()
    files = sorted(Path(str(utils.__file__)).parent.glob("models/*.py"))
    helpers = {file.stem for file in files if not model_code.is_architecture(file.stem)}
    assert {"__init__", "base", "cache", "mla", "ssm"} <= helpers
    assert len(files) - len(helpers) > 100
    assert not helpers & {*utils.MODEL_REMAPPING.values(), *utils.MODEL_ARCHITECTURE_REMAPPING.values()}
    assert model_folder.skeleton(TEXT | {"model_type": "mistral"}).model_type == "mistral"


def test_an_architecture_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(config: object) -> None:
        raise SystemExit(1)  # as mlx-lm's olmo does

    monkeypatch.setattr(mlx_lm_import.mlx_lm_utils(), "_get_classes", ends)
    with pytest.raises(ArtifactError) as caught:
        model_folder.skeleton({"model_type": "olmo"})
    assert str(caught.value) == (
        "config.json: no architecture that mlx-lm knows (Model type olmo needs a package that is not installed.). "
        "Name another model."
    )
