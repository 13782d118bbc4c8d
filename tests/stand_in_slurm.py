"""Stand-ins for ``sbatch`` and ``scontrol`` of SLURM: they run a job file on this machine."""

import os
import re
import subprocess
import sys
import time

SECONDS = {"hours": 3600, "minutes": 60, "seconds": 1}


def directives(text):
    """Return the options of the ``#SBATCH`` lines of a job file: name -> value or ""."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M)
    assert len(lines) == text.count("#SBATCH")  # none has another form
    return dict(lines)


def limit_seconds(text):
    """Return the time limit of a job in seconds: HOURS:MINUTES:SECONDS."""
    hours, minutes, seconds = map(int, text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


class Sbatch:
    """The jobs of a job file, each a process that runs in ``folder`` with the variables of SLURM.

    ``gputune`` is the command of this environment. ``scontrol`` writes its arguments to the file
    "scontrol.txt".
    """

    def __init__(self, folder):
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.write_program("gputune", f'exec "{sys.executable}" -P -m gputune "$@"')
        self.write_program("scontrol", f'echo "$@" >> "{folder}/scontrol.txt"')
        self.path = f"{self.programs}:{os.environ['PATH']}"

    def write_program(self, name, line):
        """Write a program of one line of bash that the jobs find first."""
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)

    def submit(self, text, task=None):
        """Run a job file, or one task of its array, and return the process."""
        options = directives(text)
        seconds = limit_seconds(options["time"])
        variables = {"SLURM_JOB_ID": "42", "SLURM_JOB_END_TIME": str(int(time.time() + seconds))}
        if task is not None:
            first, last = map(int, options["array"].partition("%")[0].split("-"))
            assert first <= task <= last
            variables["SLURM_ARRAY_TASK_ID"] = str(task)
        file = self.folder / "job.sbatch"
        file.write_text(text)
        return subprocess.Popen(
            ["bash", str(file)],
            cwd=self.folder,
            env={**os.environ, **variables, "PATH": self.path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
