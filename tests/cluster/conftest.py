"""A Slurm of two nodes on this machine: munge, slurmctld and two slurmd, for as long as the tests take."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.jobs import ROOT

HOSTS, MARK = Path("/etc/hosts"), "# tests/cluster"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=0
JobRequeue=1
KillWait=20
MpiDefault=none
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldLogFile={folder}/slurmctld.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """Takes jobs."""

    environment: dict[str, str]

    def call(self, *words, cwd=None, check=True):
        """Run one of Slurm's commands; what it prints."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, (words, done.stderr)
        return done.stdout.strip()

    def wait_until_idle(self, timeout=240):
        """Wait until both nodes are free."""
        deadline = time.monotonic() + timeout
        while (nodes := self.call("sinfo", "-h", "-o", "%D %T", check=False)) != "2 idle":
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are not idle: {nodes or 'no answer'}")
            time.sleep(0.2)

    def submit(self, folder, *words):
        """Submit a script, with options and arguments, when both nodes are free; the job's number."""
        self.wait_until_idle()
        return self.call("sbatch", "--parsable", *words, cwd=folder)

    def wait_for(self, condition, timeout=240):
        """Wait until `condition()`."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.call("squeue")
            time.sleep(0.1)

    def wait_until_gone(self, number, timeout=360):
        """Wait until the queue holds nothing of a job."""
        self.wait_for(lambda: not self.call("squeue", "-h", f"--jobs={number}", check=False), timeout)

    def job(self, number):
        """What Slurm says of a job, by name."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number, condition, timeout=300):
        """Wait until `condition()`; a job that waits for its next start is let start at once."""
        deadline = time.monotonic() + timeout
        while not condition():
            job = self.job(number)
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(3)  # a start within the second of the requeue finds its credential revoked
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            time.sleep(0.1)

    def wait_for_state(self, number, *states, timeout=300):
        """Wait until the job is in one of these states; what Slurm says of it then."""
        self.wait(number, lambda: self.job(number)["JobState"] in states, timeout)
        return self.job(number)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """No other process of this test run has a Slurm meanwhile: names of hosts and ports are there once."""
    with (tmp_path_factory.getbasetemp().parent / "slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def cluster(alone, tmp_path_factory):
    """A Slurm of two nodes, n1 and n2, of one CPU each."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0 or not os.access(HOSTS, os.W_OK):
        pytest.skip("starting a Slurm takes the rights of root")
    folder = tmp_path_factory.mktemp("slurm")
    for above in (folder, *folder.parents):
        if above.owner() == "root" and above.is_relative_to("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder))
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    environment = {
        **os.environ,
        "SLURM_CONF": str(config),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DISTPRUNE_CACHE": str(folder / "cache"),
    }
    # Without what a run that was killed has left.
    hosts = "\n".join(line for line in HOSTS.read_text().splitlines() if MARK not in line) + "\n"
    daemons = []
    try:
        HOSTS.write_text(f"{hosts}\n127.0.0.1 n1 {MARK}\n127.0.0.1 n2 {MARK}\n")
        for command in (
            munge,
            ["slurmctld", "-D", "-f", str(config)],
            ["slurmd", "-D", "-f", str(config), "-N", "n1"],
            ["slurmd", "-D", "-f", str(config), "-N", "n2"],
        ):
            log = (folder / f"{command[0]}-{command[-1]}.out".replace("/", "_")).open("w")
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        cluster = Cluster(environment)
        try:
            cluster.wait_until_idle()
        except TimeoutError as error:
            log = folder / "slurmctld.log"
            pytest.skip(f"Slurm does not start here: {error}; {log.read_text()[-500:] if log.exists() else 'no log'}")
        yield cluster
        cluster.call("scancel", "--state=PENDING", check=False)
        cluster.call("scancel", "--state=RUNNING", "--signal=KILL", check=False)
        deadline = time.monotonic() + 60
        while cluster.call("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        HOSTS.write_text(hosts)
