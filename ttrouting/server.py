"""How is a running OpenAI-compatible server asked, vLLM with the plugin for example?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import requests

from ttrouting.errors import TTRoutingError

PATIENCE = 600  # seconds for one answer


class ServerError(TTRoutingError):
    """A server could not be reached, or refused a request.

    Attributes:
        status: of its answer, None if there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """One server and the model that it is asked for.

    Args:
        url: with or without `/v1`. model: the name it serves; if it serves one model alone, that one is asked.

    Attributes:
        url: of the protocol, ends in `/v1`. served: the name that requests carry. context: tokens that a
            conversation may have, None if the server does not tell.

    Raises:
        ServerError: no answer, or another model.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._session = requests.Session()
        found = self.ask("GET", "models").get("data")
        served = {one["id"]: one for one in found if "id" in one} if isinstance(found, list) else {}
        if model not in served and len(served) != 1:
            raise ServerError(
                f"{url} serves {', '.join(served) or 'nothing'}, not {model}. Name one of them: --model."
            )
        self.served = model if model in served else next(iter(served))
        self.context: int | None = served[self.served].get("max_model_len")

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ServerError: none, a refusal, or something else than a JSON object.
        """
        response = self._request(method, path, body, stream=False)
        try:
            found: Any = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}/{path} gives no JSON object. Is this an OpenAI-compatible server?")
        return found

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of one streamed answer; leaving the loop early closes the connection.

        Raises:
            ServerError: as for `ask`, and an error or a broken connection in the middle.
        """
        with closing(self._request("POST", path, body, stream=True)) as response:
            try:
                for line in response.iter_lines():
                    field, _, value = line.decode("utf-8", "replace").partition(":")
                    if field != "data":
                        continue
                    if value.strip() == "[DONE]":
                        return
                    event = json.loads(value)
                    if "error" in event:
                        raise ServerError(f"{self.url}/{path} says: {str(event['error'])[:500]}")
                    yield event
            except (requests.RequestException, ValueError) as error:
                raise ServerError(f"{self.url}/{path} broke off in the middle of an answer: {error}") from None
            raise ServerError(f"{self.url}/{path} broke off in the middle of an answer. Ask again.")

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, stream: bool) -> requests.Response:
        try:
            response = self._session.request(method, f"{self.url}/{path}", json=body, timeout=PATIENCE, stream=stream)
        except requests.RequestException as error:
            raise ServerError(f"{self.url} does not answer: {error}. Is the server running?") from None
        if not response.ok:
            said = response.text[:500]
            raise ServerError(f"{self.url}/{path} says {response.status_code}: {said}", response.status_code)
        return response
