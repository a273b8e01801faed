"""Which part a process makes: what torchrun, MPI, Slurm and Kubernetes say in its environment."""

from __future__ import annotations

import pytest

from reshard.errors import UsageError
from reshard.operations.convert.which import which_part

ENGINES = {
    "torchrun": ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "3/4"),
    "Open MPI": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "1/2"),
    "MPICH": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "2/2"),
    "srun": ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, "4/4"),
    "sbatch": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "1/1"),
    "an array": (
        {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0"},
        "5/8",
    ),
    "an array with steps, from 0": (
        {
            **{"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"},
            "SLURM_ARRAY_TASK_STEP": "2",
        },
        "4/4",
    ),
    "an array of srun": (
        {
            **{"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
            **{"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        },
        "4/4",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_says_which_part(name: str) -> None:
    environment, expected = ENGINES[name]
    found = which_part("auto", environment)
    assert f"{found.number}/{found.of}" == expected
    assert which_part(f"auto/{found.of}", environment) == found


def test_kubernetes_says_the_number_only() -> None:
    assert str(which_part("auto/8", {"JOB_COMPLETION_INDEX": "7"})) == "part 8 of 8"
    with pytest.raises(UsageError, match="does not say how many") as refused:
        which_part("auto", {"JOB_COMPLETION_INDEX": "7"})
    assert refused.value.hint == "give the number: --part auto/8"


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("auto", {}, "neither torchrun, MPI, Slurm nor Kubernetes has started this process"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "the variables of torchrun make no sense"),
        ("auto", {"RANK": "0"}, "the variables of torchrun make no sense"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "torchrun says process 3 of 2"),
        ("auto/4", {"RANK": "1", "WORLD_SIZE": "2"}, "torchrun has started 2 processes"),
        ("auto/8", {"JOB_COMPLETION_INDEX": "8"}, "Kubernetes says process 9 of 8"),
        ("auto/x", {}, "'auto/x' is no number of parts"),
        ("auto/0", {}, "is no number of parts"),
        (
            "auto",
            {
                **{"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"},
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            "the variables of Slurm make no sense",
        ),
    ],
)
def test_an_engine_that_makes_no_sense(text: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        which_part(text, environment)
