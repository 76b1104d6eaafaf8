"""The chat page of a real server in headless Chromium: send, stream, stop, depth, reload, a server that goes away."""

import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from conftest import HANG, ROOT
from live_server import served
from test_web import web

from melt_runtime import MeltModel

__all__ = ["web"]
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")

QUESTION = (
    "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Eva reports to Cleo. Dan reports to Finn. "
    "Who is three levels above Cleo?"
)


class Page:
    """The page in its browser, a step at a time."""

    def __init__(self, folder, **task):
        shutil.copyfile(ROOT / "tests" / "chat_page.mjs", folder / "chat_page.mjs")
        command = ["node", "chat_page.mjs"]
        self._node = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.go_on(task)

    def go_on(self, values=None):
        """Tells it that the test has done its part."""
        self._node.stdin.write(json.dumps(values) + "\n")
        self._node.stdin.flush()

    def step(self):
        """What its next step found."""
        line = self._node.stdout.readline()
        if not line:
            _, errors = self._node.communicate(timeout=HANG)
            raise AssertionError(errors)
        return json.loads(line)

    def end(self):
        """Waits until it has closed its browser."""
        self._node.communicate(timeout=HANG)
        assert self._node.returncode == 0

    def kill(self):
        """Ends it where it stands; puppeteer, told so, ends the browser, which has a process group of its own."""
        self._node.terminate()
        self._node.communicate(timeout=HANG)


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=2)


@pytest.fixture(scope="module")
def alone(model):
    """Answers one at a time, before the server holds the model's session."""
    return {loops: model.generate(QUESTION, loops=loops, temperature=0.0) for loops in (1, 4, "auto")}


def test_the_page(web, model, alone, monkeypatch):
    assert alone[1].text != alone[4].text == "Dan."
    with served(model) as address:
        page = Page(web, address=f"{address}/", question=QUESTION)
        try:
            for loops, result in alone.items():
                found = page.step()
                user, answer = found["shown"]
                assert (user["role"], user["text"]) == ("user", QUESTION)
                assert (answer["role"], answer["text"]) == ("assistant", result.text)
                # What came while the page was busy comes in one piece.
                assert answer["loops"]
                assert set(answer["loops"]) <= set(result.loops_per_token)
                assert "tokens/s" in answer["note"]
                assert "loops a token" in answer["note"]
                assert found["depth"] == ("auto" if loops == "auto" else f"{loops} of 4 loops")
            retried = page.step()["retried"]
            assert [one["text"] for one in retried] == [QUESTION, alone["auto"].text]
            run = model.session._engine.run_pass

            def slowly():
                time.sleep(0.1)
                return run()

            monkeypatch.setattr(model.session._engine, "run_pass", slowly)
            page.go_on()
            _, answer = page.step()["stopped"]
            assert answer["note"].startswith("stopped")
            assert len(answer["text"]) < len(alone[4].text)
            monkeypatch.undo()
            with urllib.request.urlopen(f"{address}/health") as response:
                assert json.load(response)["waiting"] == 0
            found = page.step()
            assert [one["text"] for one in found["reloaded"]] == [QUESTION, answer["text"]]
            assert [one["text"] for one in found["first"]] == [QUESTION, alone[1].text]
            assert found["faults"] == []
        except BaseException:
            page.kill()
            raise
    try:
        page.go_on()
        gone = page.step()
        assert "the server does not answer" in gone["error"]
        assert [one["role"] for one in gone["kept"]] == ["user", "assistant", "user"]
        page.end()
    finally:
        page.kill()
