"""Parts of the supervisor that need no processes: when to restart, and calls that run in all front-ends."""

import pytest
from octavo.child import RestartPolicy, describe
from octavo.config import EngineConfig, ModelConfig, ServerConfig
from octavo.frontend_slots import ClusterCalls, FrontendSlot, choose_number
from octavo.ipc import ClusterCall, ClusterReply, FrontendCall
from octavo.supervisor import serve


def test_restarts_back_off_and_end_with_the_fourth_death_in_five_minutes():
    policy = RestartPolicy()
    assert [policy.after_death(t) for t in (0.0, 10.0, 20.0)] == [0.5, 1.0, 2.0]
    assert policy.after_death(299.0) is None


def test_old_deaths_are_forgiven():
    policy = RestartPolicy()
    assert [policy.after_death(t * 101.0) for t in range(9)] == [0.5, 1.0, 2.0] + [2.0] * 6


def test_deaths_are_described_for_people():
    assert describe(3) == "exit status 3"
    assert describe(-9) == "SIGKILL"


class FakeChild:
    """Keeps what it is sent."""

    ready = True

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)
        return True


def slots(count):
    return [FrontendSlot(i, child=FakeChild(), number=i) for i in range(count)]  # type: ignore[arg-type]


def test_a_cluster_call_gathers_all_answers_the_callers_first():
    all_slots = slots(3)
    calls = ClusterCalls(all_slots)
    calls.start(1, ClusterCall(7, "inflight", "{}"))
    call_ids = {slot.child.sent[0].call_id for slot in all_slots}
    assert len(call_ids) == 1
    assert all_slots[0].child.sent == [FrontendCall(*call_ids, "inflight", "{}")]
    for number in (2, 0):
        calls.reply(number, *call_ids, str(number))
    assert len(all_slots[1].child.sent) == 1
    calls.reply(1, *call_ids, "1")
    assert all_slots[1].child.sent[-1] == ClusterReply(7, ["1", "0", "2"])


def test_a_front_end_that_dies_is_not_waited_for():
    all_slots = slots(2)
    calls = ClusterCalls(all_slots)
    calls.start(0, ClusterCall(7, "drain", "{}"))
    call_id = all_slots[0].child.sent[0].call_id
    calls.reply(0, call_id, "mine")
    calls.lost(1)
    assert all_slots[0].child.sent[-1] == ClusterReply(7, ["mine"])


def test_a_front_end_that_comes_up_while_the_server_drains_drains_too():
    all_slots = slots(2)
    calls = ClusterCalls(all_slots)
    calls.repeat_drain(all_slots[1])
    assert not all_slots[1].child.sent
    calls.start(0, ClusterCall(7, "drain", "{}"))
    calls.lost(1)
    all_slots[1].child = FakeChild()
    calls.repeat_drain(all_slots[1])
    assert [(m.method, m.payload) for m in all_slots[1].child.sent] == [("drain", "{}")]
    calls.reply(1, all_slots[1].child.sent[0].call_id, "{}")
    calls.start(0, ClusterCall(8, "undrain", "{}"))
    all_slots[1].child = FakeChild()
    calls.repeat_drain(all_slots[1])
    assert not all_slots[1].child.sent


def test_answers_for_a_caller_that_died_go_nowhere():
    all_slots = slots(2)
    calls = ClusterCalls(all_slots)
    calls.start(0, ClusterCall(7, "drain", "{}"))
    call_id = all_slots[1].child.sent[0].call_id
    calls.lost(0)
    calls.reply(1, call_id, "late")
    assert not any(isinstance(message, ClusterReply) for slot in all_slots for message in slot.child.sent)


@pytest.mark.parametrize(("cores", "number"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (256, 4)])
def test_front_ends_are_a_quarter_of_the_cores_up_to_four(cores: int, number: int) -> None:
    assert choose_number("127.0.0.1:50051", cores, cores) == number
    assert choose_number("127.0.0.1:50051", cores, 1) == 1, "no more than have a core of their own"
    assert choose_number("unix:/tmp/octavo-test.sock", cores, cores) == 1


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"address": "nonsense"}, "not an address"),
        ({"address": "0.0.0.0:0"}, "--insecure-allow-remote"),
        ({"tls_cert": "cert.pem"}, "key"),
        ({"tls_client_ca": "ca.pem"}, "client CA"),
        ({"frontend_processes": -1}, "at least 1"),
        ({"frontend_processes": 2, "address": "unix:/tmp/octavo-test.sock"}, "cannot share"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line(capfd, server, words):
    config = {"address": "127.0.0.1:0", **server}
    status = serve(EngineConfig(model=ModelConfig(path="demo", name="demo")), ServerConfig(**config))
    assert status == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
