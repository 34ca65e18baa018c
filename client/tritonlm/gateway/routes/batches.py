"""OpenAI's files and batches: JSONL files of requests in, files of answers out. 501 without a folder for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from tritonlm.client.request_fields import Body
from tritonlm.client.responses_api.schemas import Metadata
from tritonlm.contract import InvalidRequest, ModelNotFound, NotOffered, RateLimited

from ..batches import store
from ..batches.store import Batch, BatchStore, StoredFile
from ..http.errors import RESPONSES
from ..http.middleware import context_of
from ..services import Services, ServicesParameter

T = TypeVar("T")
router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=RESPONSES)
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
_WINDOW_SECONDS = store.SECONDS_PER_DAY
_MAX_ACTIVE = 16
# Of a file's life, as with OpenAI.
_LEAST_SECONDS, _MOST_SECONDS = 3600, 30 * store.SECONDS_PER_DAY
_MAX_NAME = 256
_MAX_DIGITS = 20


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=_LEAST_SECONDS, le=_MOST_SECONDS)]


class BatchRequest(Body):
    input_file_id: str = Field(description="a file of the purpose batch: a line {custom_id, method, url, body} each")
    endpoint: Endpoint = Field(description="the url of every line")
    completion_window: Literal["24h"] = Field(description="what is not sent by then, expires")
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: dict[str, Any] | None = None
    request_counts: RequestCounts
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("/files")
async def upload(
    request: Request,
    services: ServicesParameter,
    file: Annotated[UploadFile, File(description="JSONL: a request in each line")],
    purpose: Annotated[str, Form(description="batch")],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[str | None, Form(alias="expires_after[seconds]")] = None,
) -> FileObject:
    """Upload a file of requests; it is deleted after --batch-days, or earlier with expires_after."""
    batches, owner = _batches(services), context_of(request.scope).caller
    if purpose != "batch":
        raise InvalidRequest("purpose must be batch: this server keeps files for batches only", "purpose")
    life = _read_life(anchor, seconds)
    name = Path(file.filename or "batch.jsonl").name[:_MAX_NAME]
    temporary = batches.folder / "work" / f"upload-{secrets.token_hex(8)}"

    def keep() -> StoredFile:
        try:
            with temporary.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            return batches.add_file(owner, name, "batch", temporary, life)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    return _file_object(await asyncio.to_thread(keep))


@router.get("/files")
async def files(
    request: Request,
    services: ServicesParameter,
    purpose: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> FileList:
    stored = await asyncio.to_thread(_batches(services).files, context_of(request.scope).caller)
    found = [_file_object(file) for file in stored if purpose in (None, file.purpose)]
    page, has_more = _page(found if order == "asc" else found[::-1], limit, after, lambda file: file.id)
    return FileList(data=page, first_id=_first(page), last_id=_first(page[::-1]), has_more=has_more)


@router.get("/files/{file_id}")
async def file(file_id: str, request: Request, services: ServicesParameter) -> FileObject:
    stored = await asyncio.to_thread(_batches(services).file, context_of(request.scope).caller, file_id)
    return _file_object(stored)


@router.get("/files/{file_id}/content", response_class=FileResponse)
async def content(file_id: str, request: Request, services: ServicesParameter) -> FileResponse:
    """The file's content, as it was uploaded or as the batch wrote it."""
    batches = _batches(services)
    stored = await asyncio.to_thread(batches.file, context_of(request.scope).caller, file_id)
    return FileResponse(batches.content(stored.id), media_type="application/octet-stream")


@router.delete("/files/{file_id}")
async def delete(file_id: str, request: Request, services: ServicesParameter) -> DeletedFile:
    await asyncio.to_thread(_batches(services).delete_file, context_of(request.scope).caller, file_id)
    return DeletedFile(id=file_id)


@router.post("/batches")
async def create(body: BatchRequest, request: Request, services: ServicesParameter) -> BatchObject:
    """Run the requests of a file, each at the lowest priority."""
    batches, owner = _batches(services), context_of(request.scope).caller
    now = time.time()

    def add() -> Batch:
        try:
            stored = batches.file(owner, body.input_file_id, "input_file_id")
        except ModelNotFound as error:
            raise InvalidRequest(f"input_file_id: {error.message}", "input_file_id") from None
        if stored.purpose != "batch":
            raise InvalidRequest("input_file_id must be a file of the purpose batch", "input_file_id")
        if sum(batch.status in store.ACTIVE for batch in batches.batches(owner)) >= _MAX_ACTIVE:
            raise RateLimited(f"{_MAX_ACTIVE} of your batches are not finished; wait for one, or cancel one")
        data = {
            "object": "batch", "endpoint": body.endpoint, "input_file_id": stored.id, "status": store.VALIDATING,
            "completion_window": body.completion_window, "created_at": int(now), "metadata": body.metadata,
            "expires_at": int(now) + _WINDOW_SECONDS, "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "output_seconds": body.output_expires_after.seconds if body.output_expires_after else None,
        }  # fmt: skip
        batch = Batch(f"batch_{secrets.token_hex(12)}", owner, store.VALIDATING, now, data)
        batches.put(batch)
        return batch

    return _batch_object(await asyncio.to_thread(add))


@router.get("/batches")
async def list_batches(
    request: Request,
    services: ServicesParameter,
    limit: int = Query(20, ge=1, le=100),
    after: str | None = None,
) -> BatchList:
    """The newest first."""
    stored = await asyncio.to_thread(_batches(services).batches, context_of(request.scope).caller)
    page, has_more = _page([_batch_object(batch) for batch in stored], limit, after, lambda batch: batch.id)
    return BatchList(data=page, first_id=_first(page), last_id=_first(page[::-1]), has_more=has_more)


@router.get("/batches/{batch_id}")
async def retrieve(batch_id: str, request: Request, services: ServicesParameter) -> BatchObject:
    return _batch_object(await asyncio.to_thread(_batches(services).batch, context_of(request.scope).caller, batch_id))


@router.post("/batches/{batch_id}/cancel")
async def cancel(batch_id: str, request: Request, services: ServicesParameter) -> BatchObject:
    """Send no further request; the answers so far become a file."""
    return _batch_object(await asyncio.to_thread(_batches(services).cancel, context_of(request.scope).caller, batch_id))


def _batches(services: Services) -> BatchStore:
    if services.batches is None:
        raise NotOffered("this server runs no batches; start it with --batch-folder FOLDER")
    return services.batches


def _read_life(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor] must be created_at", "expires_after[anchor]")
    # Python refuses to read thousands of digits.
    life = int(seconds) if seconds and seconds.isdecimal() and len(seconds) <= _MAX_DIGITS else 0
    if not _LEAST_SECONDS <= life <= _MOST_SECONDS:
        raise InvalidRequest(
            f"expires_after[seconds] must be an integer from {_LEAST_SECONDS} to {_MOST_SECONDS}",
            "expires_after[seconds]",
        )
    return life


def _file_object(file: StoredFile) -> FileObject:
    return FileObject.model_validate(
        {
            "id": file.id, "bytes": file.bytes, "created_at": file.created, "expires_at": file.expires,
            "filename": file.name, "purpose": file.purpose,
        }
    )  # fmt: skip


def _batch_object(batch: Batch) -> BatchObject:
    return BatchObject.model_validate({**batch.data, "id": batch.id})


def _page(items: Sequence[T], limit: int, after: str | None, id_of: Callable[[T], str]) -> tuple[list[T], bool]:
    first = 0
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise InvalidRequest(f"after: there is no {after[:64]!r}", "after")
        first = ids.index(after) + 1
    return list(items[first : first + limit]), first + limit < len(items)


def _first(page: Sequence[FileObject] | Sequence[BatchObject]) -> str | None:
    return page[0].id if page else None
