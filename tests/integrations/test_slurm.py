"""The job files of docs/slurm, run by a stand-in for sbatch."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import gputune
from command_line import write_table
from gputune.study.claims import Claims
from stand_in_slurm import Sbatch, directives

FILES = Path(__file__).parents[2] / "docs" / "slurm"
# One process and few epochs: seconds instead of an hour.
SHORT = "--trials 40 --epochs 400 --cv 2 --workers 1"


@pytest.fixture
def sbatch(tmp_path):
    price = np.random.default_rng(1).normal(size=500).round(3)
    write_table(tmp_path / "houses.csv", 500, price=price)
    return Sbatch(tmp_path)


def wait_for_training(folder):
    """Wait until a process reports the progress of its training."""
    study = folder / "gputune-out" / "study.db"
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end
        if study.exists():
            with Claims(study) as claims:
                if any(progress["done"] for _, progress in claims.shown()):
                    return
        time.sleep(0.05)


@pytest.mark.parametrize(("code", "requeued"), [(138, ["requeue 42"]), (143, []), (0, [])])
def test_the_script_passes_signals_on_and_requeues_after_138(sbatch, tmp_path, code, requeued):
    """With a stand-in for gputune, which ends after SIGUSR1 or SIGTERM with some exit code."""
    program = f"sleep 60 & trap 'kill $!; exit {code}' USR1 TERM; touch began; wait"
    sbatch.write_program("gputune", program)
    job = sbatch.submit((FILES / "one_gpu.sbatch").read_text())
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM if code == 143 else signal.SIGUSR1)
    job.communicate()
    assert job.returncode == code
    calls = tmp_path / "scontrol.txt"
    assert (calls.read_text().splitlines() if calls.exists() else []) == requeued


def run_a_warned_job(sbatch, tmp_path):
    text = (FILES / "one_gpu.sbatch").read_text().replace("--trials 500", SHORT)
    assert directives(text)["signal"] == "B:USR1@300"
    job = sbatch.submit(text)
    wait_for_training(tmp_path)
    job.send_signal(signal.SIGUSR1)  # SLURM signals only the batch script
    _, err = job.communicate()
    assert job.returncode == 138 and "repeat the command to resume" in err
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 42\n"
    study = gputune.Study.open(tmp_path / "gputune-out" / "study.db")
    assert {trial.state for trial in study.trials} >= {"waiting"}
    assert gputune.load_model(tmp_path / "gputune-out/model").info["score"] == study.best_score
    return text


@pytest.mark.long
def test_a_requeued_job_continues_the_search(sbatch, tmp_path):
    text = run_a_warned_job(sbatch, tmp_path)
    # Here a time limit ends the search.
    (tmp_path / "scontrol.txt").unlink()
    job = sbatch.submit(text.replace("--workers 1", "--workers 1 --timeout 0.5"))
    out, err = job.communicate()
    assert job.returncode == 0 and "Next " in out
    assert "resuming: " in err or "can continue from where training was stopped" in err
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.long
def test_a_preempted_job_ends_with_143(sbatch, tmp_path):
    text = (FILES / "one_gpu.sbatch").read_text().replace("--trials 500", SHORT)
    job = sbatch.submit(text)
    wait_for_training(tmp_path)
    begin = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.communicate()
    assert job.returncode == 143 and time.monotonic() - begin < 30
    assert not (tmp_path / "scontrol.txt").exists()  # SLURM requeues a preempted job itself


@pytest.mark.long
def test_the_jobs_of_an_array_share_one_search(sbatch, tmp_path):
    text = (FILES / "array.sbatch").read_text()
    few = "--trials 30 --epochs 20 --memory 1KB --workers 1"
    text = text.replace("--trials 500", few).replace("/scratch/gputune-out", "gputune-out")
    second = sbatch.submit(text, task=1)  # waits for the study of the first
    time.sleep(1.0)
    assert not (tmp_path / "gputune-out").exists()
    first = sbatch.submit(text, task=0)
    outputs = [job.communicate() for job in (first, second)]
    assert [job.returncode for job in (first, second)] == [0, 0], outputs
    assert "waiting for the study gputune-out" in outputs[1][1]
    assert re.search(r"Trials   \d+ complete", outputs[1][0])
    study = gputune.Study.open(tmp_path / "gputune-out" / "study.db")
    assert [trial.state for trial in study.trials] == ["complete"] * 30


@pytest.mark.parametrize("name", ["one_gpu", "array"])
def test_the_page_shows_the_file(name):
    text = (FILES / f"{name}.sbatch").read_text()
    assert f"```bash\n{text}```\n" in FILES.with_suffix(".md").read_text()


def test_timeout_auto_leaves_time_for_the_model():
    """The array's jobs end by themselves: both commands have a time limit of the job."""
    text = (FILES / "array.sbatch").read_text()
    commands = re.findall(r"gputune (?:tune|resume) .*", text)
    assert len(commands) == 2 and all("--timeout auto" in command for command in commands)
