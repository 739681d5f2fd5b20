import pytest
from scripted import ScriptedServer


@pytest.fixture
def server(monkeypatch):
    """A scripted judge, and no key in the environment."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def waits() -> list[float]:
    """The waits between tries, which no test sits through."""
    return []


@pytest.fixture
def endpoint(server, waits):
    """Make an endpoint for the scripted judge."""
    from loralloc.evaluation.judge.endpoint import Endpoint

    def endpoint(**options):
        options = {"model": "the-judge", "sleep": waits.append, **options}
        return Endpoint(options.pop("base_url", server.url), **options)

    return endpoint
