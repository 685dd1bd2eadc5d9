"""`launch/multi_node.yaml` on two hosts, each a network namespace of this machine, while their link is cut."""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.jobs import ROOT, own_cache, read_json
from tests.training.runs import Starter, command, kill, reached, whole

HOSTS = ("distprune-test-0", "distprune-test-1")
LINKS = ("dptest0", "dptest1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
NOBODY = "02:00:00:00:00:99"
TIMEOUT = 8

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def connect():
    """Make the hosts, and a link between them."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    (here, there), (first, second) = HOSTS, LINKS
    ip("link", "add", first, "netns", here, "type", "veth", "peer", "name", second, "netns", there)
    for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
        ip("-n", host, "address", "add", f"{address}/30", "dev", link)
        ip("-n", host, "link", "set", link, "up")


def remove():
    """Remove the hosts, if there are any, with all that runs on them and the link."""
    there = [line.split()[0] for line in ip("netns", "list").splitlines()]
    for host in set(HOSTS) & set(there):
        kill(int(pid) for pid in ip("netns", "pids", host).split())
        ip("netns", "delete", host)


@contextmanager
def packets_lost():
    """What the hosts send to each other arrives nowhere, and nobody tells them."""
    ways = list(zip(HOSTS, LINKS, reversed(ADDRESSES), strict=True))
    for host, link, other in ways:
        ip("-n", host, "neighbour", "replace", other, "dev", link, "lladdr", NOBODY, "nud", "permanent")
    yield
    for host, link, other in ways:
        ip("-n", host, "neighbour", "delete", other, "dev", link)


@contextmanager
def link_down():
    ip("-n", HOSTS[0], "link", "set", LINKS[0], "down")
    yield
    ip("-n", HOSTS[0], "link", "set", LINKS[0], "up")


class Launchers:
    """One launcher on each host, for a job in a folder that both see."""

    def __init__(self, folder, environment):
        self._folder = folder
        self._environment = environment
        self._running = []

    def start(self):
        self._running = [self._start(rank) for rank in (0, 1)]

    def wait_until(self, condition, timeout=240):
        deadline = time.monotonic() + timeout
        while not condition():
            assert all(launcher.poll() is None for launcher in self._running), self._outputs()
            assert time.monotonic() < deadline, self._outputs()
            time.sleep(0.02)

    def wait(self, timeout):
        """Wait until both have ended; their exit codes and what they have printed."""
        deadline = time.monotonic() + timeout
        while any(launcher.poll() is None for launcher in self._running):
            assert time.monotonic() < deadline, self._outputs()
            time.sleep(0.02)
        return [launcher.returncode for launcher in self._running], self._outputs()

    def _start(self, rank):
        host, where = HOSTS[rank], ("--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0])
        overrides = ("run.dir=run", f"integrity.timeout={TIMEOUT}")
        words = command(2, *overrides, launcher="multi_node", program=(*where, "-m", "distprune.train"))
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
        with self._output(rank).open("w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", host, *named, *words],
                cwd=self._folder,
                env={**self._environment, "GLOO_SOCKET_IFNAME": LINKS[rank]},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _output(self, rank):
        return self._folder / f"host-{rank}.out"

    def _outputs(self):
        return [self._output(rank).read_text() for rank in (0, 1)]


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "DISTPRUNE_CACHE": own_cache(tmp_path), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def undisturbed(tmp_path, environment):
    """A run on one host, which goes on beside the test; what it returns and prints."""
    with ThreadPoolExecutor() as beside:
        yield beside.submit(Starter(tmp_path, environment), 2, "run.dir=undisturbed")


@pytest.fixture
def launchers(tmp_path, environment):
    """Launchers on two hosts."""
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces takes the rights of root")
    remove()  # what a test that was killed has left
    try:
        try:
            connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield Launchers(tmp_path, environment)
    finally:
        remove()


def test_a_cut_link_is_named_on_both_hosts_and_the_same_commands_go_on(tmp_path, launchers, undisturbed):
    folder = tmp_path / "run"
    for step, cut in ((100, packets_lost), (250, link_down)):
        launchers.start()
        launchers.wait_until(reached(folder, step))
        with cut():
            codes, outputs = launchers.wait(timeout=TIMEOUT + 30)
        status = read_json(folder / "status.json")
        assert codes == [1, 1]
        assert status["state"] == "failed"
        causes = [cause_of(rank, output) for rank, output in enumerate(outputs)]
        assert status["error"] in causes
        for cause in causes:
            assert "every rank is alive (" in cause
            assert "the network between them is cut" in cause
            assert "GLOO_SOCKET_IFNAME" in cause
            for rank, host in enumerate(HOSTS):
                assert re.search(rf"rank {rank} \({host}, process \d+\) after step \d+", cause), cause

    launchers.start()
    codes, outputs = launchers.wait(timeout=240)
    assert codes == [0, 0], outputs
    assert "going on from step" in outputs[0]
    assert read_json(folder / "status.json")["state"] == "done"
    code, output = undisturbed.result()
    assert code == 0, output
    assert whole(folder) == whole(tmp_path / "undisturbed")


def cause_of(rank, output):
    """The one line in which a rank says why it ended."""
    (cause,) = re.findall(rf"^distprune: (rank {rank} at step \d+: .*)$", output, re.MULTILINE)
    assert "another rank does not answer" in cause
    assert f'File "{ROOT}/distprune/' not in output
    return cause
