"""SIGTERM for several processes that train: before the loop, and in it for one of them only."""

import signal

import pytest
from commands import CODE, finish, patient, start_together
from small_run import STEPS, arguments, write_data

pytestmark = [patient, pytest.mark.slow]
# A run that says when it comes to a place, and stays there for a while.
SLOW = """
import time
from llme_jax.training import loop

def say_and_stay(place, function, seconds):
    def slow(*arguments, **settings):
        print(place, flush=True)
        time.sleep(seconds)
        return function(*arguments, **settings)
    return slow

def make_step(*arguments, **settings):
    return say_and_stay("a step", make(*arguments, **settings), 1)

make, loop.Step = loop.Step, make_step
loop.prepare = say_and_stay("the data", loop.prepare, READING)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def terminate_at(place: str, processes: list, which: list[int]) -> None:
    for line in processes[0].stdout:
        if line.strip() == place:
            break
    for i in which:
        processes[i].terminate()


def test_before_the_loop_it_ends_them_at_once(data, tmp_path):
    code = SLOW.replace("READING", "300") + CODE
    processes = start_together(arguments(data, tmp_path / "out"), 2, devices=1, code=code)
    terminate_at("the data", processes, [0, 1])
    for process in processes:
        assert process.wait(10) == -signal.SIGTERM  # which a shell calls 143
    assert not (tmp_path / "out").exists()


def test_in_the_loop_all_save_and_leave(data, tmp_path):
    """It comes while the first step of a continued run is compiled."""
    argv = arguments(data, tmp_path / "out", "--save_steps", "1000")
    for process in start_together([*argv, "--early_exit_steps", "2"], 2, devices=1):
        finish(process)
    code = SLOW.replace("READING", "0") + CODE
    processes = start_together(argv, 2, devices=1, code=code)
    terminate_at("a step", processes, [1])
    said = [finish(process, code=143) for process in processes]
    assert "stopped by SIGTERM and saved at step" in said[0]
    kept = {int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")}
    assert min(kept) == 2 < max(kept) < STEPS
