"""`tritonlm jobs`: list, follow, cancel and resume the training jobs of a gateway, over its HTTP API."""

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
Key = Annotated[str | None, typer.Option(envvar="TRITONLM_API_KEY", help="its API key, if it requires one")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="the job, as tritonlm jobs lists it")]
DEFAULT_URL = "http://127.0.0.1:8080"


@app.callback()
def jobs(context: typer.Context, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the training jobs; `tritonlm jobs logs, cancel, resume` act on one job."""
    context.obj = _Gateway(url, api_key)
    if context.invoked_subcommand is not None:
        return
    job_list = context.obj.call("GET", "/api/jobs")["jobs"]
    if as_json:
        print_json(job_list)
        return
    table = Table("id", "name", "state", "error")
    for job in job_list:
        table.add_row(job["id"], job["name"], job["state"], job["error"] or "–")
    console.print(table)


@app.command()
def logs(
    context: typer.Context,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="follow the log until the job ends")] = False,
) -> None:
    """Show a job's log. With --follow, the exit code is 1 unless the job finishes successfully."""
    final_state = ""
    running = context.obj.call("GET", f"/api/jobs/{job_id}")["state"] in ("queued", "running")
    # Without --follow, stop when a running job's log has no new line for a second.
    read_timeout = None if follow or not running else 1.0
    with contextlib.suppress(TimedOut):
        for event, line in context.obj.events(f"/api/jobs/{job_id}/log", read_timeout):
            if event == "done":
                final_state = line
                break
            print(line)
    if follow and final_state != "finished":
        terminal.say(f"the job is {final_state}")
        raise typer.Exit(FAILED)


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Cancel a job; its saved checkpoints are kept."""
    console.print(f"{job_id} is {context.obj.call('POST', f'/api/jobs/{job_id}/cancel')['state']}")


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Resume a job from its last checkpoint."""
    console.print(f"{job_id} is {context.obj.call('POST', f'/api/jobs/{job_id}/resume')['state']}")


class _Gateway:
    """The gateway's API; an error is printed as one line and sets the exit code."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url, self._http = url, httpx.Client(base_url=url, headers=headers, timeout=30)

    def call(self, method: str, path: str) -> Any:
        with self._errors_printed():
            response = self._http.request(method, path)
            _raise_for_error(response)
            return response.json()

    def events(self, path: str, read_timeout: float | None) -> Iterator[tuple[str, str]]:
        """The (event name, data) pairs of an event stream; TimedOut after `read_timeout` without data."""
        with (
            self._errors_printed(),
            self._http.stream("GET", path, timeout=httpx.Timeout(30, read=read_timeout)) as response,
        ):
            if response.is_error:
                response.read()
            _raise_for_error(response)
            event = ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    yield event, value
                    event = ""

    @contextlib.contextmanager
    def _errors_printed(self) -> Iterator[None]:
        try:
            yield
        except httpx.ReadTimeout:
            raise TimedOut(f"{self._url} sends no data") from None
        except (httpx.TransportError, httpx.InvalidURL):
            terminal.print_error(Unavailable(f"no gateway answers at {self._url}"))
            raise typer.Exit(exit_code(Unavailable(""))) from None
        except TritonLMError as error:
            terminal.print_error(error)
            raise typer.Exit(exit_code(error)) from None


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_error:
        try:
            error = response.json()["error"]
            raise from_code(error["code"], error["message"], error["param"])
        except (ValueError, KeyError, TypeError):
            raise TritonLMError(f"the gateway answers with HTTP status {response.status_code}") from None
