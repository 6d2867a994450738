"""launch/deepspeed.sh --hostfile: two nodes that share a folder, played by two host names here."""

import os
import signal

import launching
import pytest
from launching import ROOT, signals, start, values, wait_for
from moments import free_port

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "launch/deepspeed.sh"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """ssh and pdsh that stay here; a rank's HOSTNAME is that of its node."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    launching.executable(fakes / "ssh", "echo 127.0.0.1")
    # pdsh -S -f N -w a,b COMMAND...: on every node in a shell, %n being its number
    node = 'exec bash -c "unset MASTER_ADDR; export HOSTNAME=$name; ${command//%n/$number}"'
    launching.executable(
        fakes / "pdsh",
        'echo "$*" > "$(dirname "$0")/said"\n'
        'IFS=, read -ra names <<< "$5"\ncommand="${*:6}" number=0\n'
        f'for name in "${{names[@]}}"; do\n    ({node}) &\n    number=$((number + 1))\ndone\n'
        "wait",
    )
    bin_folder = launching.stub_bin(tmp_path / "bin")
    return {"BIN": str(bin_folder), "PATH": f"{fakes}:{os.environ['PATH']}"}


def test_a_signal_reaches_ranks_of_other_nodes(tmp_path, environment):
    """And no process of this node whose number one of these has, here the launcher itself."""
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=4\n")
    out = tmp_path / "run"
    meeting = ["--rendezvous", f"127.0.0.1:{free_port()}", "--ranks", 1]
    command = [SCRIPT, "--hostfile", tmp_path / "hosts", *meeting, launching.write_config(out)]
    launch = start(command, tmp_path / "log", {**environment, "STUB_STEPS": "2000"})
    wait_for(lambda: values(out, 0) and values(out, 1), "steps", launch)
    (folder,) = out.glob("launch.*")
    assert sorted(p.name for p in folder.glob("pid-*")) == ["pid-0.one", "pid-1.two"]
    (folder / "pid-0.one").write_text(f"{launch.process.pid}\n")
    launch.signal(signal.SIGUSR1)
    assert launch.wait() == 85, launch.text
    assert signals(out, 0) == signals(out, 1) == ["SIGUSR1"]
    said = (tmp_path / "fakes/said").read_text()
    assert "--master_addr=127.0.0.1" in said and f"--master_port={meeting[1][10:]}" in said
    assert "bash" not in said and not values(out, 2), "one rank on each node, of 4 slots"
