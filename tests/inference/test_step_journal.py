"""The step journal finds a request that kills its process. All other requests end with their undisturbed texts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engine.engine import Engine
from engine.fleet import Fleet
from engine.monitoring.step_journal import Suspect, has_served, journal_file, open_journals
from engine.request import Request
from tritonlm.contract import RequestFailedRepeatedly
from tritonlm.contract.process_files import SERIES

from .harness import Collected, forward_methods, make_engine, run, save_model, step, submit

KILLER, TOKENS = [9, 9, 9], 30


class Died(BaseException):
    """Simulates the death of the process: no code after it runs, and nothing is closed."""


def engines_of_process(folder: Path, file: Path, count: int = 1) -> list[Engine]:
    """The engines of a process with this journal."""
    engines = []
    for journal in open_journals(file, count):
        made = make_engine(folder)
        engines.append(
            Engine(made.runner, made.config, lambda ids, _: "".join(f" {i}" for i in ids), (), None, journal)
        )
    return engines


class Processes:
    """Engines that share a journal, one after the other. Each dies when the killer has `dies_after` tokens."""

    def __init__(self, folder: Path, file: Path, dies_after: int = 0) -> None:
        self._folder, self._file, self._dies_after = folder, file, dies_after
        self.deaths = 0
        self.engine = self._start()

    def _start(self) -> Engine:
        (engine,) = engines_of_process(self._folder, self._file)
        for name, compute in forward_methods(engine).items():
            setattr(engine.runner, name, self._dying(compute))
        return engine

    def _dying(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(plan: Any, *more: Any) -> Any:
            if any(p.request.prompt_ids == KILLER and p.request.generated >= self._dies_after for p in plan):
                raise Died
            return compute(plan, *more)

        return forward

    def die(self) -> None:
        self.deaths += 1
        self.engine = self._start()

    def run_all(self, prompts: list[list[int]]) -> dict[str, list[int] | RequestFailedRepeatedly]:
        """Send all prompts, and after each death resume the rest, as the client does. Return tokens or the error."""
        results: dict[str, list[int] | RequestFailedRepeatedly] = {}
        received: dict[str, list[int]] = {str(prompt): [] for prompt in prompts}
        while len(results) < len(prompts):
            assert self.deaths < 6, "it kills endlessly"
            left = {str(prompt): prompt for prompt in prompts if str(prompt) not in results}
            in_flight: dict[str, Collected] = {}
            for name, prompt in left.items():
                try:
                    in_flight[name] = submit(
                        self.engine, prompt, stream=True, max_tokens=TOKENS, resume_token_ids=received[name]
                    )
                except RequestFailedRepeatedly as error:
                    results[name] = error
            try:
                run(self.engine)
            except Died:
                self.engine.deliver_now()
                self.die()
            for name, collected in in_flight.items():
                received[name] += [token for item in collected.items for token in getattr(item, "token_ids", [])]
                if any(collected.ends):
                    results[name] = received[name]
        return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama wide", tmp_path_factory.mktemp("model"))


OTHERS = [[5, 6, 7 + n] for n in range(16)]


@pytest.mark.parametrize("dies_after", [0, 1, 7, 20])
@pytest.mark.parametrize("first", [True, False])
def test_a_killer_is_refused_and_the_others_have_their_texts(
    folder: Path, tmp_path: Path, dies_after: int, first: bool
) -> None:
    undisturbed = Processes(folder, tmp_path / "undisturbed").run_all(OTHERS)
    processes = Processes(folder, tmp_path / "journal", dies_after)
    results = processes.run_all([KILLER, *OTHERS] if first else [*OTHERS, KILLER])
    killer = results.pop(str(KILLER))
    assert isinstance(killer, RequestFailedRepeatedly)
    assert killer.code == "request_failed_repeatedly"
    assert results == undisturbed
    assert processes.deaths <= (2 if dies_after == 0 else 4)
    # A further attempt is refused at once.
    with pytest.raises(RequestFailedRepeatedly):
        submit(processes.engine, KILLER, max_tokens=TOKENS)


def test_two_deaths_with_many_requests_refuse_none_of_them(folder: Path, tmp_path: Path) -> None:
    undisturbed = Processes(folder, tmp_path / "undisturbed").run_all(OTHERS)
    processes = Processes(folder, tmp_path / "journal")
    for _ in range(2):
        for prompt in OTHERS:
            submit(processes.engine, prompt, max_tokens=TOKENS)
        for _ in range(20):
            processes.engine.process_inbox()
            processes.engine.step()
        processes.die()
    assert processes.run_all(OTHERS) == undisturbed


def test_an_idle_process_that_dies_refuses_no_request(folder: Path, tmp_path: Path) -> None:
    processes = Processes(folder, tmp_path / "journal")
    for _ in range(4):
        assert isinstance(processes.run_all([OTHERS[0]])[str(OTHERS[0])], list)
        processes.die()
    assert isinstance(processes.run_all([OTHERS[0]])[str(OTHERS[0])], list)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, b"\x05\0\0\0\0\0\0\0[1,2]", b"\x13\0\0\0\0\0\0\0" + b'{"steps": [[[1]]]} '],
)
def test_a_broken_journal_is_ignored(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    assert isinstance(Processes(folder, tmp_path / "journal").run_all([OTHERS[0]])[str(OTHERS[0])], list)


def test_a_closed_engine_removes_its_journal(folder: Path, tmp_path: Path) -> None:
    engine = Processes(folder, tmp_path / "journal").engine
    engine.start()
    engine.close()
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("same_triton", [True, False])
def test_the_last_step_of_another_triton_does_not_count_and_earlier_deaths_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_triton: bool
) -> None:
    def suspect() -> Suspect | None:
        return open_journals(tmp_path / "journal")[0].suspect(request)

    request: Any = SimpleNamespace(fingerprint="killer", steps=1)
    open_journals(tmp_path / "journal")[0].record([request])
    first = suspect()
    assert first is not None
    assert first.deaths == 1
    open_journals(tmp_path / "journal")[0].record([request])
    if not same_triton:
        monkeypatch.setattr("os.getppid", lambda: 4_194_399)
    second = suspect()
    assert second is not None
    assert second.deaths == (2 if same_triton else 1)
    assert second.is_killer is same_triton


def test_a_request_of_another_engine_is_a_suspect_on_each_and_no_killer_beside_it(tmp_path: Path) -> None:
    killer, innocent = (cast(Request, SimpleNamespace(fingerprint=name, steps=1)) for name in ("killer", "innocent"))
    for _ in range(2):
        for journal, request in zip(open_journals(tmp_path / "journal", 2), (killer, innocent), strict=True):
            journal.record([request])
    journals = open_journals(tmp_path / "journal", 2)
    suspects = [journal.suspect(request) for journal in journals for request in (killer, innocent)]
    assert [(s.deaths, s.is_killer, s.isolated_steps > 0) for s in suspects if s] == [(2, False, True)] * 4
    journals[1].record([killer])
    assert [s.is_killer for journal in open_journals(tmp_path / "journal", 2) if (s := journal.suspect(killer))] == [
        True
    ] * 2


def test_engines_of_a_process_remove_their_journal_together(tmp_path: Path) -> None:
    first, second = open_journals(tmp_path / "journal", 2)
    second.record([cast(Request, SimpleNamespace(fingerprint="running", steps=1))])
    first.close()
    # This process dies while its second engine computes.
    assert open_journals(tmp_path / "journal")[0].suspect(cast(Request, SimpleNamespace(fingerprint="running")))
    second.close()
    assert not (tmp_path / "journal").exists()


def test_while_a_suspect_is_isolated_one_engine_of_a_fleet_gets_all_requests(folder: Path, tmp_path: Path) -> None:
    died = engines_of_process(folder, tmp_path / "journal", 2)
    for engine in died:
        submit(engine, OTHERS[0], max_tokens=TOKENS)
        step(engine)
    engines = engines_of_process(folder, tmp_path / "journal", 2)
    fleet = Fleet(engines)

    def shares(*prompts: list[int]) -> list[int]:
        for prompt in prompts:
            submit(fleet, prompt, max_tokens=TOKENS)
        return [engine.in_flight for engine in engines]

    assert shares(OTHERS[1]) == [1, 0]
    assert shares(OTHERS[0], OTHERS[2]) == [3, 0], "a suspect, and one that comes after it"
    run(engines[0])
    assert shares(OTHERS[3], OTHERS[4]) == [1, 1]


def test_journals_of_one_series_belong_to_its_tritons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    alone = journal_file("generate", "weights")
    monkeypatch.setenv(SERIES, f"{os.getpid()}-1234abcd")
    ours = journal_file("generate", "weights")
    assert ours != alone
    open_journals(ours)
    assert has_served()
    monkeypatch.setattr("os.getppid", lambda: 4_194_399)
    assert journal_file("generate", "weights") == ours
    # This Triton's own engines have not been ready yet.
    assert not has_served()


def test_journals_of_tritons_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    mine = journal_file("generate", "weights")
    gone = tmp_path / mine.name.replace(f"-{mine.name.split('-')[3]}-", "-4194399-")
    for file in (mine, gone):
        file.touch()
    assert journal_file("generate", "weights") == mine
    assert mine.exists()
    assert not gone.exists()
    assert journal_file("generate", "other weights") != mine
