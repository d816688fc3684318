from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.tasks.report_device import ReportDevice, read_device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ('[run]\ndevice = "cpu"\ndevice_name = "M4"\nthreads = 8\n', ReportDevice("cpu: M4", 8)),
        ('[run]\ndevice = "gpu"\ndevice_name = "M4"\n', ReportDevice("gpu: M4", None)),
        (
            '[run]\ndevice = "cpu"\ndevice_name = "M4"\nthreads = 1\nranks = 2\nbackend = "ring"\n',
            ReportDevice("cpu: M4", 1, "2 (ring)"),
        ),
        ('[run]\ndevice_name = "M4"\nseconds = 1.0\n', ReportDevice("unknown", None)),
        ("steps = 3\n", ReportDevice("unknown", None)),
    ],
)
def test_the_device_is_read_from_the_table_of_the_run(tmp_path: Path, text: str, device: ReportDevice) -> None:
    report = tmp_path / "report.toml"
    report.write_text(text)
    assert read_device(report) == device


def test_a_record_has_threads_only_where_the_cpu_computed() -> None:
    assert ReportDevice("cpu: M4", 8).record() == {"device": "cpu: M4", "threads": 8}
    assert ReportDevice("gpu: M4", None).record() == {"device": "gpu: M4"}


def test_a_record_has_ranks_only_where_several_trained() -> None:
    assert ReportDevice("gpu: M4", None, "2 (ring)").record() == {"device": "gpu: M4", "ranks": "2 (ring)"}


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    report = tmp_path / "report.toml"
    report.write_text('[run]\nthreads = "two"\n')
    with pytest.raises(ArtifactError) as caught:
        read_device(report)
    assert str(caught.value) == (
        f"{report}: run.threads: expected `int | null`, got `str`. Remove it and build it again."
    )
