"""Launch scripts as texts: their syntax, their help, their dry runs and what they refuse."""

import re
import signal
import socket
import subprocess
import sys
import time

import fake_slurm
import launching
import pytest
from launching import ROOT, run

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*")])
HELPFUL = [p for p in SCRIPTS if p.name in ("torchrun.sh", "deepspeed.sh") or p.suffix == ".sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    if path.name not in ("launcher.sh", "job.sh", "await.sh"):  # which are sourced
        assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.skipif(launching.SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path):
    check = [launching.SHELLCHECK, "-x"]
    done = subprocess.run([*check, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "bad.sh"  # negative control
    bad.write_text("#!/bin/bash\nrm -rf $1/$2\n")
    assert subprocess.run([*check, bad], capture_output=True, check=False).returncode == 1


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return {"BIN": str(launching.real_bin(tmp_path_factory.mktemp("bin") / "bin"))}


@pytest.mark.parametrize("path", HELPFUL, ids=lambda p: p.name)
def test_help_names_every_option(path, tmp_path):
    launch = run(["bash", path, "--help"], tmp_path / "log", {"MOE_ROOT": str(ROOT)})
    assert launch.ended == [0] and "#" not in launch.text and "set -e" not in launch.text
    for option in ("--dry-run", "BIN"):
        assert option in launch.text
    cases = [
        w
        for w in path.read_text().split()
        if w.startswith("--") and w.endswith(")") and w != "--help)"
    ]
    assert all(option.rstrip(")") in launch.text for option in cases)


def dry(arguments, tmp_path, environment) -> str:
    """What a dry run prints, with places made short; it must leave nothing behind."""
    before = {*tmp_path.rglob("*"), tmp_path / "log"}
    launch = run(arguments, tmp_path / "log", environment, cwd=ROOT)
    assert launch.ended == [0], launch.text
    assert set(tmp_path.rglob("*")) == before
    text = launch.text.replace(str(ROOT), "ROOT").replace(environment["BIN"], "BIN")
    return text.replace(str(tmp_path), "TMP").strip()


RANK = "ROOT/launch/rank.sh TMP/run/launch.XXXXXX TMP/run BIN/python TMP/run.yaml seed=1"


def test_dry_run_of_torchrun(tmp_path, environment):
    config = launching.write_config(tmp_path / "run")
    script = [ROOT / "launch/torchrun.sh", "--dry-run"]
    assert dry([*script, config, "seed=1"], tmp_path, environment) == (
        "+ BIN/python -m torch.distributed.run --nnodes 1 --nproc-per-node 1 --rdzv-backend c10d "
        f"--rdzv-endpoint localhost:0 --rdzv-id moe --max-restarts 0 --no-python {RANK}"
    )
    many = ["--nodes", "2:4", "--rendezvous", "head:2950", "--ranks", 8, "--max-restarts", 3]
    found = dry([*script, *many, "--id", "x", config, "seed=1"], tmp_path, environment)
    assert found == (
        "+ env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 BIN/python -m torch.distributed.run "
        "--nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d "
        f"--rdzv-endpoint head:2950 --rdzv-id x --max-restarts 3 --no-python {RANK}"
    )
    other = dry([*script, config, f"out={tmp_path}/other run"], tmp_path, environment)
    assert r"TMP/other\ run/launch.XXXXXX TMP/other\ run BIN/python" in other, "out= decides"


def test_dry_run_of_deepspeed(tmp_path, environment):
    config = launching.write_config(tmp_path / "run")
    script = [ROOT / "launch/deepspeed.sh", "--dry-run", "--ranks", 2]
    two = ["--nodes", 2, "--node-rank", 1, "--rendezvous", "head:2950"]
    assert dry([*script, *two, config, "seed=1"], tmp_path, environment) == (
        "+ BIN/python -m deepspeed.launcher.launch "
        "--world_info=eyJub2RlLTAiOiBbMCwxXSwgIm5vZGUtMSI6IFswLDFdfQ== --node_rank=1 "
        f"--master_addr=head --master_port=2950 --no_python --no_local_rank {RANK}"
    )  # {"node-0": [0,1], "node-1": [0,1]}
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    named = [*script, "--hostfile", tmp_path / "hosts", "--rendezvous", "a:2950"]
    assert dry([*named, config, "seed=1"], tmp_path, environment) == (
        "+ BIN/python -m deepspeed.launcher.runner --hostfile TMP/hosts --num_gpus 2 "
        f"--master_addr a --master_port 2950 --no_python --no_local_rank {RANK}"
    )
    bare = [script[0], "--dry-run", "--hostfile", tmp_path / "hosts", config, "seed=1"]
    found = dry(bare, tmp_path, environment)
    assert re.search(r"--hostfile TMP/hosts --master_port \d{5} --no_python", found), "no more"


STEP = "+ srun --nodes {n} --ntasks {n} --ntasks-per-node 1 --kill-on-bad-exit=1"
JOB = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_NNODES": "3"}


def test_dry_run_of_slurm(tmp_path, environment):
    fakes = fake_slurm.install(tmp_path / "slurm")
    job = {**environment, **JOB, "SLURM_JOB_NODELIST": "localhost[1-3]"}
    job["PATH"] = f"{fakes}:/usr/bin:/bin"
    train = ["bash", ROOT / "launch/slurm/train.sbatch", "--dry-run", "c.yaml", "out=o"]
    meeting = "--nodes 3 --rendezvous localhost:20007"
    assert dry(train, tmp_path, job) == (
        f"{STEP.format(n=3)} ROOT/launch/torchrun.sh {meeting} --id 7-2 --max-restarts 0 "
        "c.yaml out=o"
    )
    apptainer = {
        **job,
        "MOE_CONTAINER": "x.sif",
        "MOE_MOUNTS": "/d:/d",
        "MOE_LAUNCHER": "deepspeed",
    }
    assert dry(train, tmp_path, apptainer) == (
        f"{STEP.format(n=3)} apptainer exec --nv --pwd ROOT --bind ROOT:ROOT\\,/d:/d x.sif "
        f"ROOT/launch/deepspeed.sh {meeting} c.yaml out=o"
    )
    pyxis = {**job, "MOE_CONTAINER": "lab/moe:1", "MOE_RANKS": "4", "MOE_RESTARTS": "1"}
    assert dry(train, tmp_path, pyxis) == (
        f"{STEP.format(n=3)} --container-image=lab/moe:1 --container-mounts=ROOT:ROOT "
        f"--container-workdir=ROOT ROOT/launch/torchrun.sh {meeting} --ranks 4 --id 7-2 "
        "--max-restarts 1 c.yaml out=o"
    )
    for name in ("upcycle", "eval"):
        script = ["bash", ROOT / f"launch/slurm/{name}.sbatch", "--dry-run", "a", "--out", "b c"]
        assert dry(script, tmp_path, job) == rf"{STEP.format(n=1)} BIN/moe {name} a --out b\ c"


def test_dry_run_outside_of_a_job(tmp_path, environment):
    train = ["bash", ROOT / "launch/slurm/train.sbatch", "--dry-run", "c.yaml"]
    assert "--nodes 1 --rendezvous" in dry(train, tmp_path, environment)


def refusal(arguments, tmp_path, environment) -> str:
    launch = run(arguments, tmp_path / "log", environment, cwd=ROOT)
    assert launch.ended == [2], launch.text
    assert len(launch.text.splitlines()) == 1, launch.text
    return launch.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "0"], "--ranks 0 is not a number from 1 on"),
        (["--nodes", "2"], "--nodes 2 needs --rendezvous HOST:PORT"),
        (["--rendezvous", "head"], "--rendezvous head is not HOST:PORT"),
        (["--rendezvous", "a:99999"], "--rendezvous a:99999: a port is a number from 1 to 65535"),
        (["--rendezvous", "a:0"], "--rendezvous a:0: a port is a number from 1 to 65535"),
        (["--what"], "--what is not an option"),
        (["--ranks"], "--ranks needs a value"),
    ],
)
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_wrong_options_are_refused(tmp_path, environment, name, options, said):
    config = launching.write_config(tmp_path / "run")
    script = ROOT / f"launch/{name}.sh"
    command = [script, *options, *([] if said.endswith("value") else [config])]
    assert said in refusal(command, tmp_path, environment)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("torchrun", ["--nodes", "4:2", "--rendezvous", "a:2"], "--nodes 4:2: MIN is larger"),
        ("deepspeed", ["--hostfile", "{}", "--ranks", "x"], "--ranks x is not a number from 1"),
        ("deepspeed", ["--hostfile", "{}", "--rendezvous", "a:0"], "a port is a number from 1"),
    ],
)
def test_what_only_one_takes_is_refused_in_a_dry_run_too(
    tmp_path, environment, name, options, said
):
    config = launching.write_config(tmp_path / "run")
    options = [option.format(config) for option in options]
    command = [ROOT / f"launch/{name}.sh", "--dry-run", *options, config]
    assert said in refusal(command, tmp_path, environment)


def test_what_the_machine_lacks_is_said_in_a_line(tmp_path, environment):
    script, out = ROOT / "launch/torchrun.sh", tmp_path / "run"
    config = launching.write_config(out)
    none = {**environment, "BIN": str(tmp_path)}
    assert f"{tmp_path} has no python" in refusal([script, config], tmp_path, none)
    launching.executable(tmp_path / "python", f'exec {sys.executable} -S -I "$@"')
    assert "cannot import moe" in refusal([script, config], tmp_path, none)
    missing = refusal([script, tmp_path / "no.yaml"], tmp_path, environment)
    assert "no.yaml is not a file" in missing
    assert "CONFIG is missing" in refusal([script], tmp_path, environment)
    (tmp_path / "file").touch()
    blocked = refusal([script, config, f"out={tmp_path}/file/run"], tmp_path, environment)
    assert "cannot be written to" in blocked
    wrong = run([script, config, "train.stepz=1", "seed=x"], tmp_path / "log", environment)
    assert wrong.ended == [2] and "Did you mean `steps`?" in wrong.text and "seed" in wrong.text


def test_ranks_and_gpus_are_held_together(tmp_path, environment):
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    launching.executable(fakes / "nvidia-smi", "printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'")
    environment = {**environment, "PATH": f"{fakes}:/usr/bin:/bin"}
    script = [ROOT / "launch/torchrun.sh", "--dry-run"]
    config = launching.write_config(tmp_path / "run")
    assert "--nproc-per-node 4" in dry([*script, config], tmp_path, environment)
    two = {**environment, "CUDA_VISIBLE_DEVICES": "1,3"}
    assert "--nproc-per-node 2" in dry([*script, config], tmp_path, two)
    said = refusal([*script, "--ranks", 3, config], tmp_path, two)
    assert "--ranks 3: there are 2 GPUs here" in said


def test_a_port_that_is_taken_is_said(tmp_path, environment):
    config = launching.write_config(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        meeting = ["--nodes", 2, "--rendezvous", f"localhost:{taken.getsockname()[1]}", config]
        first = {**environment, "SLURM_NODEID": "0"}
        for name in ("torchrun", "deepspeed"):
            said = refusal([ROOT / f"launch/{name}.sh", *meeting], tmp_path, first)
            assert "is taken on" in said


def test_batch_scripts_refuse_to_run_outside_of_a_job(tmp_path):
    for name in ("train", "upcycle", "eval"):
        script = ["bash", ROOT / f"launch/slurm/{name}.sbatch", "x"]
        assert "no SLURM job here" in refusal(script, tmp_path, {})
    elsewhere = {"SLURM_SUBMIT_DIR": str(tmp_path)}
    assert "is not the repository" in refusal(script, tmp_path, elsewhere)


@pytest.mark.parametrize("lasting", [True, False])
def test_no_storm_of_signals_ends_the_wait(tmp_path, lasting):
    """Negative control: bash's own `wait` ends with the first signal."""
    script = tmp_path / "script.sh"
    await_child = f'. {ROOT}/launch/await.sh\nawait "$child"'
    wait_once = 'code=0\nwait "$child" || code=$?'
    launching.executable(
        script,
        # a trap has the arguments of the function that it interrupts
        "file=$1\nnoted() { [ -e $file.noted ] || echo $1 > $file.noted; }\n"
        "trap 'noted TERM' TERM\ntrap 'noted USR1' USR1\n"
        'setsid bash -c "sleep 2; exit 7" &\nchild=$!\ntouch $file\n'
        f"{await_child if lasting else wait_once}\nexit $code",
    )
    files = [tmp_path / str(n) for n in range(40)]
    running = [subprocess.Popen([script, file]) for file in files]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    for number in [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM] * 4:
        for process in running:
            process.send_signal(number)
    codes = {process.wait(60) for process in running}
    assert (codes == {7}) is lasting
