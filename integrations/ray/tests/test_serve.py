"""Replicas on several nodes: their answers, conversations, clients that go, replicas and nodes that are lost."""

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import ray
from conftest import STORE
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from serving import CHATS, KEY, TEXTS, Told, ask, asked, long_stream, read, wait_until

from melt_ray.bundles import BundleIdentity
from melt_ray.serve import ServeArgs, build
from melt_runtime import BundleError, MeltError, MeltModel

NODE = {"num_cpus": 1, "resources": {"replica": 1}, "object_store_memory": STORE}
QUESTION = "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"
STORY = " ".join(f"{a} reports to {b}." for a, b in zip("ABCDEFGHIJKLMNOPQRSTU", "BCDEFGHIJKLMNOPQRSTUV", strict=True))


@pytest.fixture(scope="module")
def deploy(cluster, bundle, tmp_path_factory) -> Iterator[Callable[..., int]]:
    """Deploys so many replicas, as ``serve deploy`` does with a file, waits until they run, and gives the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    key = tmp_path_factory.mktemp("secret") / "key"
    key.write_text(KEY)
    args = {"bundle": str(bundle), "api_key_file": str(key), "device": "cpu", "slots": 4, "health_seconds": 1}
    args |= {"ingress_resources": {"head": 0.1}, "resources": {"replica": 1}, "drain_seconds": 60}

    def run(count: int, **changes) -> int:
        scaling = {"min_replicas": count, "max_replicas": count, "target_ongoing_requests": 4}
        application = {
            "name": "default",
            "import_path": "melt_ray.serve:build",
            "args": {**args, **changes},
            "deployments": [{"name": "engine", "autoscaling_config": scaling}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        wait_until(lambda: running(count) and len(replicas()) == count)
        return port

    yield run
    serve.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster) -> list:
    """Two nodes with room for one replica each; the ingress is on the head."""
    return [cluster.add_node(**NODE) for _ in range(2)]


@pytest.fixture(scope="module")
def port(deploy, nodes) -> int:
    """Two replicas, on a node each."""
    return deploy(2)


def replicas() -> list[str]:
    """The names of the actors that are replicas."""
    found = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in found if name.startswith("SERVE_REPLICA::default#engine#"))


def running(count: int) -> bool:
    """Whether so many replicas run, and no other."""
    application = serve.status().applications.get("default")
    if application is None or application.status != "RUNNING":
        return False
    states = application.deployments["engine"].replica_states
    return {str(getattr(state, "value", state)): number for state, number in states.items() if number} == {
        "RUNNING": count
    }


def under_load(port: int, clients: int, meanwhile: Callable[[], None], tokens: int = 300) -> list[Told]:
    """What clients were told that ask again and again, half of them for streams, while something happens."""
    told: list[Told] = []
    over, begun = threading.Event(), threading.Semaphore(0)

    def run(client: int) -> None:
        number = 0
        while not over.is_set():
            body = long_stream(client * 1000 + number, tokens)
            told.append(ask(port, TEXTS, body if client % 2 else {**body, "stream": False}))
            number += 1
            begun.release()

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            begun.acquire()
        meanwhile()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return told


def test_answers_are_the_models(port, bundle):
    model = MeltModel.load(bundle, device="cpu", capacity=512, slots=4)
    chat = [{"role": "user", "content": QUESTION}]
    for loops in (1, 4):
        expected = model.generate(chat, loops=loops, temperature=0.0)
        body = {"messages": chat, "loops": loops, "temperature": 0.0}
        told = ask(port, CHATS, body)
        assert told.status == 200
        assert told.body["choices"][0]["message"]["content"] == expected.text
        assert told.body["usage"]["completion_tokens"] == len(expected.token_ids)
        told = ask(port, CHATS, {**body, "stream": True})
        assert told.is_whole
        pieces = [event["choices"][0]["delta"].get("content", "") for event in told.events if event]
        assert "".join(pieces) == expected.text


def test_errors_have_openais_form(port):
    for path, body, status, code in (
        (CHATS, {"messages": [{"role": "user", "content": "x"}], "unknown": "y"}, 400, "invalid_value"),
        (CHATS, {"messages": [{"role": "user", "content": "x"}], "model": "other"}, 404, "model_not_found"),
        (TEXTS, {"prompt": [5] * 2100}, 400, "context_length_exceeded"),
        (TEXTS, {"prompt": "x" * (5 << 20)}, 413, "body_too_large"),
        ("/nothing", {}, 404, "unknown_url"),
    ):
        told = ask(port, path, body)
        assert (told.status, told.error["code"]) == (status, code), told
    told = ask(port, CHATS, {"messages": [{"role": "user", "content": "x"}]}, {"Authorization": f"Bearer not-{KEY}"})
    assert (told.status, told.error["code"]) == (401, "invalid_api_key")
    assert ask(port, "/health").body["slots"] == 4
    assert ask(port, "/v1/models").body["data"][0]["id"] == "melt-tiny"


def test_turns_of_a_conversation_are_in_one_replicas_cache(port):
    seen = set()
    for number in range(8):
        messages = [{"role": "user", "content": f"{number} {STORY} Who is one level above A?"}]
        first = ask(port, CHATS, {"messages": messages, "max_tokens": 8})
        messages.append(first.body["choices"][0]["message"] | {"refusal": None})
        del messages[-1]["refusal"]
        messages.append({"role": "user", "content": "Who is one level above B?"})
        second = ask(port, CHATS, {"messages": messages, "max_tokens": 8})
        assert first.replica == second.replica
        assert second.body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        seen.add(first.replica)
    assert len(seen) == 2


def test_a_client_that_goes_away_frees_its_slot(port):
    named = {"x-session-id": "gone"}  # what is asked by that name goes where the stream is

    def load() -> dict:
        told = ask(port, "/health", headers=named)
        assert told.replica == response.getheader("x-melt-replica")
        return told.body

    with asked(port, TEXTS, long_stream(1, 1500), named) as response:
        assert response.readline().startswith(b"data: ")
        assert load()["running"] == 1
    wait_until(lambda: load()["running"] == 0)
    passes = load()["passes"]
    assert load()["passes"] == passes < 4 * 1500


def streams_through(port: int, lose: Callable[[dict[str, http.client.HTTPResponse]], None]) -> dict[str, Told]:
    """What long streams were told, one on each of two replicas, that were under way while something happened."""
    with ExitStack() as stack:
        streams: dict[str, http.client.HTTPResponse] = {}
        number = 0
        while len(streams) < 2:
            number += 1
            response = stack.enter_context(asked(port, TEXTS, long_stream(50_000 + number, 1500)))
            assert response.readline().startswith(b"data: ")
            streams.setdefault(response.getheader("x-melt-replica"), response)
        lose(streams)
        return {name: read(response) for name, response in streams.items()}


def test_a_lost_replica_ends_its_streams_with_one_error(port):
    lost, told = "", {}

    def lose(streams) -> None:
        nonlocal lost
        lost = min(streams)
        name = f"SERVE_REPLICA::default#engine#{lost}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        wait_until(lambda: running(2) and name not in replicas())

    others = under_load(port, 4, lambda: told.update(streams_through(port, lose)))
    assert all(one.is_clear for one in others), [one for one in others if not one.is_clear]
    assert told.pop(lost).error["code"] == "replica_lost"
    assert all(one.is_whole for one in told.values())
    assert {one.error["code"] for one in others if not one.is_whole} <= {"replica_lost"}


def test_a_lost_node_ends_its_streams_with_one_error(port, cluster, nodes):
    cluster.add_node(**NODE)  # where its replica goes
    told = {}

    def lose(_) -> None:
        before = replicas()
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_until(lambda: running(2) and replicas() != before)

    others = under_load(port, 4, lambda: told.update(streams_through(port, lose)))
    assert all(one.is_clear for one in others), [one for one in others if not one.is_clear]
    (lost,) = [one for one in told.values() if not one.is_whole]
    assert lost.error["code"] == "replica_lost"
    assert {one.error["code"] for one in others if not one.is_whole} <= {"replica_lost"}


def test_replicas_come_and_go_without_a_lost_stream(port, deploy):
    def scale() -> None:
        for count in (1, 2, 1):
            before = set(replicas())
            deploy(count)
            assert before <= set(replicas()) or before >= set(replicas())  # those that stay are not replaced

    told = under_load(port, 4, scale, tokens=100)
    assert all(one.is_whole for one in told), [one for one in told if not one.is_whole]
    assert len({one.replica for one in told}) == 3


def test_a_replica_is_replaced_without_a_lost_stream(port, deploy):
    before = replicas()
    told = under_load(port, 4, lambda: deploy(1, most_waiting=2048))
    assert set(before).isdisjoint(replicas())
    assert all(one.is_whole for one in told), [one for one in told if not one.is_whole]


def test_a_node_with_something_else_is_named(cluster, bundle, tmp_path):
    expected = BundleIdentity.of(bundle)
    expected.require_here()
    node = ray.get_runtime_context().get_node_id()[:12]
    for other, kind, message in (
        (BundleIdentity(str(tmp_path), expected.fingerprint), BundleError, "must be on every node that may run it"),
        (BundleIdentity(str(bundle), "0" * 64), BundleError, f"must have the fingerprint {'0' * 64}"),
        (BundleIdentity(str(bundle), expected.fingerprint, "9.9"), MeltError, "install melt-onnx==9.9 there"),
    ):
        with pytest.raises(kind, match=message) as raised:
            other.require_here()
        assert node in str(raised.value)
    with pytest.raises(BundleError, match="melt-ray fingerprint prints it where the bundle lies"):
        build(ServeArgs(bundle=tmp_path, no_key=True))
