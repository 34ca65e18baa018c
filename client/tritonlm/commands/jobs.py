"""`tritonlm jobs`: the training jobs of a gateway: list, follow, cancel, resume. It talks HTTP, as any caller does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from tritonlm.contract import TimedOut, TritonLMError, Unavailable
from tritonlm.contract.errors import from_code
from tritonlm.serving import terminal

from .common import FAILED, AsJson, console, exit_code, print_json

app = typer.Typer(
    help="Training jobs of a gateway.", invoke_without_command=True, rich_markup_mode=None, add_completion=False
)
Url = Annotated[str, typer.Option(envvar="TRITONLM_URL", help="the gateway")]
Key = Annotated[str | None, typer.Option(envvar="TRITONLM_API_KEY", help="its key, where it asks for one")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="the job, as tritonlm jobs lists it")]
DEFAULT_URL = "http://127.0.0.1:8080"


@app.callback()
def jobs(context: typer.Context, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the training jobs; `tritonlm jobs logs, cancel, resume` look at one or change it."""
    context.obj = _Gateway(url, api_key)
    if context.invoked_subcommand is not None:
        return
    found = context.obj.ask("GET", "/api/jobs")["jobs"]
    if as_json:
        print_json(found)
        return
    table = Table("id", "name", "state", "error")
    for job in found:
        table.add_row(job["id"], job["name"], job["state"], job["error"] or "–")
    console.print(table)


@app.command()
def logs(
    context: typer.Context,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job ends")] = False,
) -> None:
    """Show a job's log. Followed to its end, the exit code is 1 unless the job is finished."""
    ended = ""
    running = context.obj.ask("GET", f"/api/jobs/{job_id}")["state"] in ("queued", "running")
    # Unfollowed, what is there comes at once; then the log is quiet.
    patience = None if follow or not running else 1.0
    with contextlib.suppress(TimedOut):
        for event, line in context.obj.events(f"/api/jobs/{job_id}/log", patience):
            if event == "done":
                ended = line
                break
            print(line)
    if follow and ended != "finished":
        terminal.say(f"the job is {ended}")
        raise typer.Exit(FAILED)


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """End a job; what it has saved stays."""
    console.print(f"{job_id} is {context.obj.ask('POST', f'/api/jobs/{job_id}/cancel')['state']}")


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Go on with a job from its last checkpoint."""
    console.print(f"{job_id} is {context.obj.ask('POST', f'/api/jobs/{job_id}/resume')['state']}")


class _Gateway:
    """Its errors become one line and an exit code."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url, self._http = url, httpx.Client(base_url=url, headers=headers, timeout=30)

    def ask(self, method: str, path: str) -> Any:
        with self._explained():
            response = self._http.request(method, path)
            _refuse(response)
            return response.json()

    def events(self, path: str, patience: float | None) -> Iterator[tuple[str, str]]:
        """(event's name, data) of a stream of events; TimedOut after so long without one."""
        with (
            self._explained(),
            self._http.stream("GET", path, timeout=httpx.Timeout(30, read=patience)) as response,
        ):
            if response.is_error:
                response.read()
            _refuse(response)
            event = ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    yield event, value
                    event = ""

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.ReadTimeout:
            raise TimedOut(f"{self._url} is quiet") from None
        except (httpx.TransportError, httpx.InvalidURL):
            terminal.explain(Unavailable(f"no gateway answers at {self._url}"))
            raise typer.Exit(exit_code(Unavailable(""))) from None
        except TritonLMError as error:
            terminal.explain(error)
            raise typer.Exit(exit_code(error)) from None


def _refuse(response: httpx.Response) -> None:
    if response.is_error:
        try:
            error = response.json()["error"]
            raise from_code(error["code"], error["message"], error["param"])
        except (ValueError, KeyError, TypeError):
            raise TritonLMError(f"the gateway answers with HTTP status {response.status_code}") from None
