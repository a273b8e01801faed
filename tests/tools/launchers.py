"""Stand-ins for what starts one command on many machines: Slurm, Kubernetes and MPI. torchrun is started itself."""

from __future__ import annotations

import os
import random
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import warm_commands
import yaml


class Cluster:
    """Machines that see one folder, /shared, and have one of their own each, /local.

    Each way to start a job takes the text of a page, and returns what its processes print, once all have ended well.
    """

    def __init__(self, room: Path, environment: Mapping[str, str]) -> None:
        self.shared = room / "shared"
        self.locals = [room / "local-1", room / "local-2"]
        for folder in (self.shared, *self.locals):
            folder.mkdir()
        self._room, self._environment = room, environment

    def shell(self, text: str) -> list[str]:
        """Run the lines of a shell one after the other: torchrun is started on two machines at once."""
        ways = {"srun": _srun, "mpirun": _mpirun, "torchrun": _torchrun}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        text = text.replace("\\\n", " ").replace("HOST:29400", f"127.0.0.1:{port}")
        text = text.replace("HOST", "127.0.0.1").replace("29400", str(port))
        said = []
        for line in text.splitlines():
            words = shlex.split(line)
            tasks, command = ways[words[0]](words)
            said += self._together([(command, variables) for variables in tasks])
        return said

    def sbatch(self, text: str) -> list[str]:
        """Run a script as the tasks of its array, one after the other, in any order."""
        options = dict(line.split("=") for line in text.splitlines() if line.startswith("#SBATCH") and "=" in line)
        first, last = map(int, options["#SBATCH --array"].split("-"))
        array = {"SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_COUNT": str(last - first + 1)}
        numbers = random.Random(0).sample(range(first, last + 1), last - first + 1)
        batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", **array}
        tasks = [{**batch, "SLURM_ARRAY_TASK_ID": str(number)} for number in numbers]
        return [said for task in tasks for said in self._together([(["bash", "-euc", text], task)])]

    def kubectl(self, text: str) -> list[str]:
        """Run the pods of an indexed Job at the same time."""
        job = yaml.safe_load(text)
        assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # as backoffLimitPerIndex asks
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(word, str) for word in container["command"])
        indexes = [str(number) for number in range(job["spec"]["completions"])]
        return self._together([(container["command"], {"JOB_COMPLETION_INDEX": index}) for index in indexes])

    def _together(self, tasks: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[str]:
        path = os.pathsep.join([str(Path(warm_commands.python()).parent), os.environ["PATH"]])
        there = {**os.environ, **self._environment, "PATH": path, "OMP_NUM_THREADS": "1"}
        processes = []
        for number, (command, variables) in enumerate(tasks):
            local = str(self.locals[number % len(self.locals)])
            words = [word.replace("/shared", str(self.shared)).replace("/local", local) for word in command]
            processes.append(
                subprocess.Popen(
                    words,
                    cwd=self._room,
                    env={**there, **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            said = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), said
        return [line for out, _ in said for line in out.splitlines(keepends=True)]


def _srun(words: Sequence[str]) -> tuple[list[dict[str, str]], Sequence[str]]:
    assert (words[1], words[3]) == ("--nodes", "--ntasks-per-node")
    count = int(words[2]) * int(words[4])
    known = {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)}
    return [{**known, "SLURM_PROCID": str(number)} for number in range(count)], words[5:]


def _mpirun(words: Sequence[str]) -> tuple[list[dict[str, str]], Sequence[str]]:
    assert words[1] == "-n"
    known = {"OMPI_COMM_WORLD_SIZE": words[2]}
    return [{**known, "OMPI_COMM_WORLD_RANK": str(number)} for number in range(int(words[2]))], words[3:]


def _torchrun(words: Sequence[str]) -> tuple[list[dict[str, str]], Sequence[str]]:
    assert words[1] == "--nnodes"
    return [{} for _ in range(int(words[2]))], words
