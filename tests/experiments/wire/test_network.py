"""The test network: what is counted, what is shaped, and that nothing of it is left."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from experiments.wire import network

UNAVAILABLE = network.why_unavailable()


def needs_network(test):
    available = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    return pytest.mark.network(available(test))


# Takes a number of connections to receive from and a list of address and bytes to send, all at
# once; prints the bytes received, and the times of the first connection and the last byte.
TRAFFIC = """
import json, socket, sys, threading, time

connections, sends = json.loads(sys.argv[1])
count = 0

def receive(connection):
    global count
    while data := connection.recv(1 << 16):
        count += len(data)

def send(address, size):
    while True:
        try:
            connection = socket.create_connection((address, 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    connection.sendall(bytes(size))
    connection.close()

server = socket.create_server(("", 5000))
threads = [threading.Thread(target=send, args=each) for each in sends]
for thread in threads:
    thread.start()
start = None
for _ in range(connections):
    connection, _ = server.accept()
    start = start or time.monotonic()
    threads.append(threading.Thread(target=receive, args=(connection,)))
    threads[-1].start()
for thread in threads:
    thread.join()
print(json.dumps([count, start, time.monotonic()]))
"""


def exchange(net: network.Network, plan: dict[int, list[tuple[int, int]]]) -> list[list[float]]:
    """Sends as planned, {sender: [(receiver, bytes)]}; each host's bytes, start and end."""
    processes = []
    for host in range(len(net.addresses)):
        connections = sum(receiver == host for sends in plan.values() for receiver, _ in sends)
        sends = [(net.addresses[receiver], size) for receiver, size in plan.get(host, [])]
        argv = [sys.executable, "-c", TRAFFIC, json.dumps([connections, sends])]
        processes.append(net.popen(host, argv, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate(timeout=20)[0]) for process in processes]


def say(net: network.Network, host: int, code: str, **options: Any) -> str:
    """What some Python prints on a host."""
    argv = [sys.executable, "-c", code]
    process = net.popen(host, argv, stdout=subprocess.PIPE, text=True, **options)
    return process.communicate(timeout=20)[0].strip()


def processes_in(namespaces: set[str]) -> list[str]:
    """The processes that are in one of these network namespaces."""
    found = []
    for link in pathlib.Path("/proc").glob("[0-9]*/ns/net"):
        try:
            if os.readlink(link) in namespaces:
                found.append(link.parts[2])
        except OSError:  # it has ended meanwhile
            continue
    return found


def assert_nothing_left(namespaces: set[str]) -> None:
    """No process is in the namespaces, soon, and nothing else keeps them."""
    deadline = time.monotonic() + 5
    while processes_in(namespaces) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_in(namespaces) == []
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    assert not any(namespace in mounts for namespace in namespaces)


# Prints the network namespace, and stays with a child that has left its process group.
STAY = "readlink /proc/self/ns/net; (setsid sleep 300 > /dev/null 2>&1 &); exec sleep 300"


@needs_network
def test_bytes_sent_are_counted_at_both_ends_and_nowhere_else():
    size = 20_000_000
    with network.Network(hosts=3) as net:
        time.sleep(1)  # for what the kernel might send of its own accord
        assert net.counters() == [(0, 0)] * 3
        assert exchange(net, {0: [(1, size)]})[1][0] == size
        sender, receiver, other = net.counters()
    assert size < sender.sent < 1.02 * size
    assert size < receiver.received < 1.02 * size
    assert receiver.sent == sender.received < 0.02 * size
    assert other == (0, 0)


@needs_network
@pytest.mark.parametrize(
    ("plan", "megabytes"),
    [
        pytest.param({0: [(1, 10**6)], 1: [(0, 10**6)]}, 1, id="both directions at once"),
        pytest.param({0: [(1, 10**6), (2, 10**6)]}, 2, id="one host sends to two"),
        pytest.param({0: [(2, 10**6)], 1: [(2, 10**6)]}, 2, id="two hosts send to one"),
    ],
)
def test_each_direction_of_a_link_has_the_rate(plan, megabytes):
    """The fullest link takes no less than its bytes at 20 Mbit/s, with headers of up to 5 %."""
    with network.Network(hosts=3, rate="20mbit") as net:
        results = exchange(net, plan)
    times = [(start, end) for count, start, end in results if count]
    expected = megabytes * 8 / 20
    assert max(end for _, end in times) - min(start for start, _ in times) > 0.95 * expected


@needs_network
def test_a_host_has_a_name_that_stands_for_its_address():
    names = "import socket; print(*map(socket.gethostbyname, ['host0', socket.gethostname()]))"
    with network.Network(hosts=2) as net:
        assert say(net, 1, names) == "10.0.0.1 10.0.0.2"
    assert net.addresses == ("10.0.0.1", "10.0.0.2")


@needs_network
def test_a_host_has_a_loopback_and_no_way_out():
    loopback = (
        "import socket; s = socket.create_server(('localhost', 0)); print(s.getsockname()[0])"
    )
    out = "socket.create_connection(('192.0.2.1', 80))"
    way_out = f"import socket\ntry: {out}\nexcept OSError as error: print(error.strerror)"
    interfaces = "import os; print(*sorted(os.listdir('/sys/class/net')))"
    with network.Network(hosts=1) as net:
        assert say(net, 0, loopback) == "127.0.0.1"
        assert say(net, 0, way_out) == "Network is unreachable"
        assert say(net, 0, interfaces) == "eth0 lo"


@needs_network
def test_a_program_gets_environment_and_folder(tmp_path):
    code = (
        "import os; print(os.getcwd(), *(os.environ.get(n) for n in os.environ['NAMES'].split()))"
    )
    names = "SASG_HOST_INDEX SASG_HOST_COUNT SASG_HOST_ADDRESSES HOME"
    with network.Network(hosts=2) as net:
        said = say(net, 1, code, env={"NAMES": names}, cwd=tmp_path)
        here = say(net, 0, "import os; print(os.getcwd(), os.environ['PATH'])")
    assert said == f"{tmp_path} 1 2 10.0.0.1,10.0.0.2 None"
    assert here == f"{os.getcwd()} {os.environ['PATH']}"


@needs_network
def test_a_program_is_signalled_as_any_child():
    code = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(3)); print(flush=True); input()"
    )
    with network.Network(hosts=1) as net:
        argv, pipe = [sys.executable, "-c", code], subprocess.PIPE
        with net.popen(0, argv, stdin=pipe, stdout=pipe) as process:
            assert process.stdout
            process.stdout.readline()
            process.terminate()
            assert process.wait(timeout=10) == 3


@needs_network
def test_a_delay_is_added_one_way_or_refused_without_netem():
    code = (
        "import socket, sys, time; start = time.perf_counter()\n"
        "try: socket.create_connection((sys.argv[1], 1))\n"
        "except ConnectionRefusedError: print(time.perf_counter() - start)"
    )
    try:
        with network.Network(hosts=2, delay="20ms") as net:
            argv = [sys.executable, "-c", code, net.addresses[1]]
            process = net.popen(0, argv, stdout=subprocess.PIPE)
            assert float(process.communicate(timeout=20)[0]) >= 0.04
    except RuntimeError as error:
        assert "delay needs netem" in str(error)  # noqa: PT017
        pytest.skip("this kernel has no netem")


@needs_network
def test_two_networks_at_once_know_nothing_of_each_other():
    size = 1_000_000
    with network.Network(hosts=2) as one, network.Network(hosts=2) as two:
        exchange(one, {0: [(1, size)]})
        assert two.counters() == [(0, 0)] * 2
        exchange(two, {1: [(0, 2 * size)]})
        assert size < one.counters()[1].received < 1.02 * size
        assert 2 * size < two.counters()[0].received < 2.04 * size
        here = {path.read_text() for path in pathlib.Path("/sys/class/net").glob("*/address")}
        assert "02:00:00:00:00:01\n" not in here


@needs_network
def test_nothing_is_left_after_an_exception():
    namespaces, processes = set(), []
    with pytest.raises(ZeroDivisionError), network.Network(hosts=2) as net:  # noqa: PT012
        for host in range(2):
            process = net.popen(host, ["sh", "-c", STAY], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout
            namespaces.add(process.stdout.readline().strip())
            process.stdout.close()
        assert len(processes_in(namespaces)) >= 4
        print(1 / 0)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    assert_nothing_left(namespaces)


@needs_network
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(number):
    argv = [sys.executable, *"-m experiments.wire.network --hosts 2 -- sh -c".split(), STAY]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        namespaces = {process.stdout.readline().split("] ")[1].strip() for _ in range(2)}
        assert len(processes_in(namespaces)) >= 4
        process.send_signal(number)
        assert process.wait(timeout=10) == (130 if number == signal.SIGINT else -number)
    assert_nothing_left(namespaces)


@needs_network
def test_a_network_ends_while_a_forked_child_lives():
    """A child that was forked without exec holds the owner's end of the pipe open too."""
    code = (
        "import os, signal, time; from experiments.wire import network\n"
        "with network.Network(hosts=1) as net:\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(60); os._exit(0)\n"
        "os.kill(child, signal.SIGKILL); print('ended')"
    )
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout == "ended\n"


@needs_network
@pytest.mark.parametrize("tool", ["ip", "tc", "bridge"])
def test_what_was_made_before_a_failure_is_removed(monkeypatch, tool):
    started, namespaces = [], set()
    batch, start_first = network._batch, network._start_first

    def start(*arguments):
        started.append(start_first(*arguments))
        return started[-1]

    def fail_at_the_last(first, what, lines):
        namespaces.add(os.readlink(f"/proc/{first}/ns/net"))
        last = first == started[1].pid or what == "bridge"
        batch(first, what, ["nonsense"] if last and what == tool else lines)

    monkeypatch.setattr(network, "_start_first", start)
    monkeypatch.setattr(network, "_batch", fail_at_the_last)
    with pytest.raises(RuntimeError, match=f"could not be made: {tool}: .*nonsense"):
        network.Network(hosts=2).__enter__()
    assert [process.poll() for process in started] == [0, 0, 0]
    assert_nothing_left(namespaces)


@needs_network
def test_a_host_that_cannot_be_made_says_why(monkeypatch):
    monkeypatch.setattr(network, "_FIRST_PROCESS", "mount /nonsense")
    with pytest.raises(RuntimeError, match=r"could not be made: mount: .*nonsense"):
        network.Network(hosts=2).__enter__()


@needs_network
def test_the_command_runs_on_every_host(capfd):
    code = (
        "import os, sys; print(os.environ['SASG_HOST_INDEX']); print(sys.argv[1], file=sys.stderr);"
        "print('no newline', end='')"
    )
    with pytest.raises(SystemExit) as end:
        network.main(["--hosts", "2", "--", sys.executable, "-c", code, "--rate"])
    assert end.value.code == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    for host in range(2):
        ours = [line for line in lines if line.startswith(f"[host {host}]")]
        assert ours == [f"[host {host}] {host}", f"[host {host}] no newline"]
    assert sorted(err.splitlines()) == ["[host 0] --rate", "[host 1] --rate"]


@needs_network
def test_the_command_prints_what_each_host_sent(capfd):
    size = 1_000_000
    plans = json.dumps([[0, [("host1", size)]], [1, []]])
    pick = f"import json, os; plan = json.loads('{plans}')[int(os.environ['SASG_HOST_INDEX'])]\n"
    code = pick + "import sys; sys.argv.append(json.dumps(plan))\n" + TRAFFIC
    with pytest.raises(SystemExit):
        network.main(["--hosts", "2", "--", sys.executable, "-c", code])
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if "10.0.0." in line]
    (_, _, sent, _), (_, address, _, received) = rows
    assert address == "10.0.0.2"
    assert size < int(sent.replace(",", "")) < 1.02 * size
    assert size < int(received.replace(",", "")) < 1.02 * size


@needs_network
@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_the_first_failure_ends_all_and_is_the_status(capfd, end, status):
    code = f"""
    if [ $SASG_HOST_INDEX = 1 ]; then sleep 0.3; {end}; fi
    trap 'echo asked to end; exit 5' TERM
    sleep 300 & wait
    """
    with pytest.raises(SystemExit) as error:
        network.main(["--hosts", "3", "--", "sh", "-c", code])
    assert error.value.code == status
    out, err = capfd.readouterr()
    assert "[host 0] asked to end\n" in out
    assert "[host 2] asked to end\n" in out
    assert f"host 1 has ended with status {status}" in err


@needs_network
def test_a_program_that_does_not_exist_is_a_failure(capfd):
    with pytest.raises(SystemExit) as error:
        network.main(["--hosts", "1", "--", "no-such-program"])
    assert error.value.code == 127
    assert "no-such-program" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "0"], "Expected hosts=0 to be from 1 to 250"),
        (["--hosts", "251"], "Expected hosts=251 to be from 1 to 250"),
        (["--rate", "fast"], "Expected rate='fast' to be a number and a unit (kbit, mbit, gbit)"),
        (["--rate", "1gb"], "Expected rate='1gb' to be"),
        (["--rate", "99kbit"], "Expected rate='99kbit' to be"),
        (["--rate", "101gbit"], "from 100kbit to 100gbit"),
        (["--delay", "5"], "Expected delay='5' to be a number and a unit (us, ms, s)"),
        (["--delay=-5ms"], "Expected delay='-5ms' to be"),
        (["--delay", "11s"], "from 0us to 10s"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(monkeypatch, arguments, message):
    monkeypatch.setattr(network.Network, "__enter__", None)  # nothing is made
    with pytest.raises(SystemExit) as error:
        network.main([*arguments, "--", "true"])
    assert message in str(error.value)


def test_a_command_is_needed(monkeypatch):
    monkeypatch.setattr(network.Network, "__enter__", None)
    with pytest.raises(SystemExit, match=r"Expected command=\(\) to be a program"):
        network.main(["--hosts", "2"])


def test_what_is_missing_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert "needs Linux" in str(network.why_unavailable())
    if sys.platform != "linux":
        return
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="error: A test network needs root"):
        network.main(["--", "true"])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else tool)
    assert "tc (of iproute2)" in str(network.why_unavailable())


def test_help_tells_the_environment():
    argv = [sys.executable, "-m", "experiments.wire.network", "--help"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for words in (
        "SASG_HOST_INDEX",
        "SASG_HOST_COUNT",
        "SASG_HOST_ADDRESSES",
        "--delay",
        "-- COMM",
    ):
        assert words in text
