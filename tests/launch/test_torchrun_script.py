"""launch/torchrun.sh and launch/deepspeed.sh with real launchers, and a stand-in for training."""

import contextlib
import json
import os
import signal

import launching
import psutil
import pytest
from launching import ROOT, run, signals, start, undisturbed, values, wait_for
from moments import free_port

pytestmark = pytest.mark.slow
RARE = ["torchrun", pytest.param("deepspeed", marks=pytest.mark.full)]
AGENTS = {"torchrun": "distributed.run", "deepspeed": "launcher.launch"}
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


def away(pid: int, timeout: float = 30) -> bool:
    """Whether the process has ended, by itself."""
    end = launching.time.monotonic() + timeout
    while launching.time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        launching.time.sleep(0.05)
    psutil.Process(pid).kill()
    return False


MOMENTS = ["at once", "checks", "+ ", "agent", "rank.sh", "python"]
EARLY = [pytest.param("deepspeed", m, marks=pytest.mark.full) for m in MOMENTS if m != "python"]


@pytest.mark.parametrize(
    ("name", "moment"), [*(("torchrun", m) for m in MOMENTS), ("deepspeed", "python"), *EARLY]
)
def test_a_signal_while_it_starts_is_a_preemption(tmp_path, environment, name, moment):
    """However early: nothing has failed, so that the job is to be requeued."""
    out = tmp_path / "run"
    slow = tmp_path / "slow"
    slow.mkdir()
    marks = {"checks": "import moe", "agent": AGENTS[name], "python": "-u -m moe.train"}
    wait = f'case "$*" in *"{marks.get(moment, "nothing")}"*) touch {slow}/there; sleep 1 ;; esac'
    launching.executable(slow / "python", f'{wait}\nexec {environment["BIN"]}/python "$@"')
    options = ["--ranks", 2] + (["--max-restarts", 3] if name == "torchrun" else [])
    command = [SCRIPTS[name], *options, launching.write_config(out)]
    launch = start(command, tmp_path / "log", {**environment, "BIN": str(slow), "STUB_STEPS": "99"})
    if moment == "at once":  # as soon as bash has read the first lines
        wait_for(lambda: launching.answers(launch.process.pid, signal.SIGUSR1), "a trap", launch)
    elif moment == "+ ":
        wait_for(lambda: "+ " in launch.text, "the launcher", launch)
    elif moment == "rank.sh":
        wait_for(lambda: list(out.glob("launch.*/pid-*")), "a rank", launch)
    else:
        wait_for((slow / "there").exists, moment, launch)
    launch.signal(signal.SIGUSR1)
    assert launch.wait() == 85, launch.text
    assert len(values(out, 0)) <= 2 and "Traceback" not in launch.text
    assert not list(out.glob("launch.*"))
    passed, begun = "passed on to the ranks" in launch.text, moment in ("rank.sh", "python")
    assert passed == begun or moment == "agent", launch.text


@pytest.mark.parametrize("moment", ["python", "steps"])
@pytest.mark.parametrize("name", RARE)
def test_a_signal_to_every_process_is_none_more(tmp_path, environment, name, moment):
    """As SLURM sends USR1 to a step: the launchers' own processes would die of it."""
    out, there = tmp_path / "run", tmp_path / "there"
    wait = f'case "$*" in "-u -m moe.train"*) touch {there}; sleep 1 ;; esac'
    launching.executable(tmp_path / "python", f'{wait}\nexec {environment["BIN"]}/python "$@"')
    command = [SCRIPTS[name], "--ranks", 2, launching.write_config(out)]
    more = {**environment, "BIN": str(tmp_path), "STUB_STEPS": "2000"}
    launch = start(command, tmp_path / "log", more)
    steps = moment == "steps"
    condition = (lambda: values(out, 0) and values(out, 1)) if steps else there.exists
    wait_for(condition, moment, launch)
    for process in [psutil.Process(launch.process.pid), *launching.below(launch.process.pid, "")]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    assert launch.wait() == 85, launch.text
    assert set(signals(out, 0)) == set(signals(out, 1)) == {"SIGUSR1"}
    assert (out / "state-0.json").exists() and (out / "state-1.json").exists()


def test_nodes_that_never_meet_are_left_after_a_while(tmp_path, environment):
    out = tmp_path / "run"
    nodes = ["--nodes", 2, "--rendezvous", f"localhost:{free_port()}"]
    script = tmp_path / "torchrun.sh"
    launching.executable(script, "")
    text = SCRIPTS["torchrun"].read_text().replace("\nfind_python\n", "\nPATIENCE=2\nfind_python\n")
    script.write_text(
        text.replace('ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)', f"ROOT={ROOT}")
    )
    launch = start([script, *nodes, launching.write_config(out)], tmp_path / "log", environment)
    name = AGENTS["torchrun"]
    wait_for(lambda: launching.below(launch.process.pid, name), "the agent", launch)
    launch.signal(signal.SIGTERM)
    assert launch.wait(60) == 85, launch.text
    assert "before any rank has begun" in launch.text


@pytest.mark.parametrize("name", SCRIPTS)
def test_ranks_end_saved_when_their_launcher_is_killed(tmp_path, environment, name):
    out = tmp_path / "run"
    command = [SCRIPTS[name], "--ranks", 2, launching.write_config(out)]
    launch = start(command, tmp_path / "log", {**environment, "STUB_STEPS": "2000"})
    wait_for(lambda: values(out, 0) and values(out, 1), "steps", launch)
    started = launching.below(launch.process.pid, "")
    assert not signals(out, 0), "negative control: nothing ends them while it lives"
    launch.process.kill()  # not waited for: a zombie holds nothing
    assert all(away(process.pid) for process in started)
    assert signals(out, 0) == signals(out, 1) == ["lost launcher"]
    assert json.loads((out / "state-1.json").read_text())[0] == len(values(out, 1))
    launch.process.wait()


@pytest.mark.parametrize("name", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.full)])
def test_a_connection_that_is_closed_is_a_signal(tmp_path, environment, name):
    """Its output goes nowhere any more; rank 0 still saves."""
    out = tmp_path / "run"
    reader, writer = os.pipe()
    command = [SCRIPTS[name], "--ranks", 2, launching.write_config(out)]
    process = launching.subprocess.Popen(
        [*launching.LISTENING, *map(str, command)], stdout=writer, stderr=writer,
        start_new_session=True,
        env={**os.environ, **launching.QUIET, **environment, "STUB_STEPS": "2000"},
    )  # fmt: skip
    os.close(writer)
    launch = launching.Launch(process, tmp_path / "log")
    launch.log.touch()
    wait_for(lambda: values(out, 0) and values(out, 1), "steps", launch)
    os.close(reader)
    launch.signal(signal.SIGHUP)
    assert launch.wait() == 85
    assert signals(out, 0) == signals(out, 1) == ["SIGHUP"]
    assert (out / "state-0.json").exists() and (out / "state-1.json").exists()


@pytest.mark.parametrize(
    ("name", "again"),
    [("torchrun", False), ("torchrun", True), ("deepspeed", False),
     pytest.param("deepspeed", True, marks=pytest.mark.full)],
)  # fmt: skip
def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path, environment, name, again):
    out = tmp_path / "run"
    command = [SCRIPTS[name], "--ranks", 2, launching.write_config(out)]
    more = {"STUB_STEPS": "2000", "STUB_SAVE": "60" if again else "0.3"}
    launch = start(command, tmp_path / "log", {**environment, **more})
    wait_for(lambda: values(out, 0) and values(out, 1), "steps", launch)
    started = launching.below(launch.process.pid, "")
    os.killpg(launch.process.pid, signal.SIGINT)  # a terminal's goes to the whole group
    wait_for(lambda: signals(out, 0) and signals(out, 1), "signals", launch)
    if again:
        os.killpg(launch.process.pid, signal.SIGINT)
    assert launch.wait(30) == (130 if again else 85), launch.text
    assert all(away(process.pid, 5) for process in started)
    assert (out / "state-0.json").exists() is not again
    assert again or "Traceback" not in launch.text


def test_a_signal_meets_only_processes_of_this_run(tmp_path, environment):
    """Ranks of other nodes of a hostfile write numbers of theirs into the folder that all share."""
    out = tmp_path / "run"
    command = [SCRIPTS["torchrun"], "--ranks", 1, launching.write_config(out)]
    stranger = launching.subprocess.Popen(["sleep", "300"])
    launch = start(command, tmp_path / "log", {**environment, "STUB_SAVE": "60"})
    wait_for(lambda: values(out, 0), "steps", launch)
    (folder,) = out.glob("launch.*")
    (folder / "pid-1.elsewhere").write_text(f"{stranger.pid}\n")
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
        launch.signal(number)
        launching.time.sleep(0.3)
    assert launch.wait(30) == 130, launch.text
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
