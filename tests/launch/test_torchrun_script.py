"""launch/torchrun.sh and launch/deepspeed.sh with real launchers, and a stand-in for training."""

import json
import signal

import launching
import pytest
from launching import ROOT, run, signals, start, undisturbed, values, wait_for

pytestmark = pytest.mark.slow
SCRIPTS = {"torchrun": ROOT / "launch/torchrun.sh", "deepspeed": ROOT / "launch/deepspeed.sh"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return {"BIN": str(launching.stub_bin(tmp_path_factory.mktemp("bin") / "bin"))}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_ends_with_85_and_goes_on_exactly(tmp_path, environment, name, number):
    out = tmp_path / "run"
    command = [SCRIPTS[name], "--ranks", 2, launching.write_config(out)]
    out.mkdir()
    (out / "preempted").write_text("of an earlier life")
    first = start(command, tmp_path / "first", environment)
    wait_for(lambda: values(out, 0) and values(out, 1), "steps", first)
    first.signal(number)
    wait_for(lambda: signals(out, 0) and signals(out, 1), "signals", first)
    for again in (number, signal.SIGTERM, signal.SIGUSR1):  # while ranks are saving
        first.signal(again)
    assert first.wait() == 85, first.text
    assert signals(out, 0) == signals(out, 1) == [signal.Signals(number).name]
    assert json.loads((out / "preempted").read_text())["step"] < 20
    assert not list(out.glob("launch.*")), "nothing of the launcher's is left"
    second = run(command, tmp_path / "second", environment)
    assert second.ended == [0] and not (out / "preempted").exists()
    for rank in (0, 1):
        assert values(out, rank) == undisturbed(rank)
        log = (out / f"logs/rank-0000{rank}.log").read_text()
        assert log.count("attempt 0") == 2 and f"rank {rank} begins at step 0" in log
    assert "rank 0 begins" in second.text and "rank 1 begins" not in second.text


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("old", [False, True])
def test_a_failing_ranks_code_is_passed_on(tmp_path, environment, name, old):
    out = tmp_path / "run"
    out.mkdir()
    if old:  # negative control: a marker that was there before tells nothing
        (out / "preempted").write_text("of an earlier life")
        (out / "failed-0").touch()
    command = [SCRIPTS[name], "--ranks", 1 if old else 2, launching.write_config(out)]
    # the other rank is told to end, and takes that for a preemption: it is none
    failing = {"STUB_FAIL": "1:3:3" if not old else "0:0:0", "STUB_ALONE": "1"}
    if old:  # ends before it removes the marker
        launching.executable(tmp_path / "python", f'[ "$2" != -m ] || exit 2\n'
                             f'exec {environment["BIN"]}/python "$@"')  # fmt: skip
        failing["BIN"] = str(tmp_path)
    launch = run(command, tmp_path / "log", {**environment, **failing})
    assert launch.ended == [2 if old else 3], launch.text
    assert f"ended with {2 if old else 3}. The end of {out}/logs/rank-0000" in launch.text


def test_a_killed_rank_is_started_again_and_a_preempted_one_is_not(tmp_path, environment):
    out = tmp_path / "run"
    command = [SCRIPTS["torchrun"], "--ranks", 2, "--max-restarts", 2, launching.write_config(out)]
    dying = {"STUB_FAIL": "1:3:137", "STUB_ALONE": "1"}
    first = start(command, tmp_path / "first", {**environment, **dying})
    log = out / "logs/rank-00001.log"
    wait_for(lambda: log.exists() and "attempt 1" in log.read_text(), "a restart", first)
    begun = len(values(out, 1))
    wait_for(lambda: len(values(out, 1)) > begun, "steps after it", first)
    first.signal(signal.SIGUSR1)
    assert first.wait() == 85, first.text
    assert "attempt 2" not in log.read_text(), "no restart of what is to end"


def test_a_run_that_preempts_itself_is_not_restarted(tmp_path, environment):
    out = tmp_path / "run"
    command = [SCRIPTS["torchrun"], "--max-restarts", 2, launching.write_config(out)]
    launch = run(command, tmp_path / "log", {**environment, "STUB_FAIL": "0:3:85"})
    assert launch.ended == [85] and values(out, 0) == undisturbed(0, 3)


def test_without_restarts_a_killed_rank_ends_the_run(tmp_path, environment):
    out = tmp_path / "run"
    command = [SCRIPTS["torchrun"], "--ranks", 1, launching.write_config(out)]
    launch = run(command, tmp_path / "log", {**environment, "STUB_FAIL": "0:3:137"})
    assert launch.ended == [137] and len(values(out, 0)) == 3


def test_a_signal_before_any_rank_is_there_ends_the_launcher(tmp_path, environment):
    out = tmp_path / "run"
    command = [SCRIPTS["torchrun"], "--max-restarts", 3, launching.write_config(out)]
    launch = start(command, tmp_path / "log", environment)
    wait_for(lambda: list(out.glob("launch.*")) and "+ " in launch.text, "the launcher", launch)
    launching.time.sleep(0.3)
    launch.signal(signal.SIGUSR1)
    assert launch.wait() not in (0, 85), launch.text
    assert not values(out, 0)
