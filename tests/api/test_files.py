"""The Files API: what is kept for a key and given back, and what is refused, in words."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from tests.api.house import House

from trivec.accounts import RateLimits, Scope
from trivec.core.errors import SettingInvalid, StoreUnavailable
from trivec.jobs.files import FileStorage
from trivec.settings import BatchLimits

LINE = b'{"custom_id": "a"}\n'
PURPOSE = {"purpose": "batch"}
DAY_S = 24 * 3600


def kept_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def upload(
    client: httpx.AsyncClient, content: bytes = LINE, form: Mapping[str, str] = PURPOSE
) -> httpx.Response:
    given = {**PURPOSE, **form}
    return await client.post("/files", files={"file": ("in.jsonl", content)}, data=given)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[House]:
    house = House(
        files_url=str(tmp_path / "files"),
        batch_limits=BatchLimits(key_bytes_max=2048, key_files_max=3, file_bytes_max=1024),
    )
    yield house
    house.close()


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[House]:
    """With the limits that are set where nobody sets any."""
    house = House(files_url=str(tmp_path))
    yield house
    house.close()


async def test_an_upload_has_a_time_of_its_own_however_briefly_its_client_waits_for_answers(
    house: House,
) -> None:
    async with house.client() as client:
        client.headers["x-stainless-read-timeout"] = "0.000001"
        made = await upload(client)
    assert made.status_code == 200, made.text


@pytest.mark.parametrize("path", ["/v1", "/openai/v1"])
async def test_a_file_goes_in_and_comes_out_again(house: House, path: str) -> None:
    content = bytes(range(256)) * 20_000  # of several pieces
    async with house.client() as client:
        client.base_url = httpx.URL(f"http://house{path}")
        made = (await upload(client, content)).json()
        shown = (await client.get(f"/files/{made['id']}")).json()
        found = await client.get(f"/files/{made['id']}/content")
        gone = await client.delete(f"/files/{made['id']}")
        after = await client.get(f"/files/{made['id']}")
        again = await client.delete(f"/files/{made['id']}")
    assert (
        made
        == shown
        == {
            "id": made["id"],
            "object": "file",
            "bytes": len(content),
            "created_at": 1_700_000_000,
            "expires_at": 1_700_000_000 + 30 * DAY_S,
            "filename": "in.jsonl",
            "purpose": "batch",
            "status": "processed",
        }
    )
    assert found.content == content
    assert found.headers["content-length"] == str(len(content))
    assert gone.json() == {"id": made["id"], "object": "file", "deleted": True}
    assert (after.status_code, again.status_code) == (404, 404)


async def test_it_lists_in_pages_in_either_order(house: House) -> None:
    async with house.client() as client:
        ids = []
        for _ in range(5):
            ids.append((await upload(client)).json()["id"])
            house.clock.move(1)
        newest = (await client.get("/files?limit=2")).json()
        rest = (await client.get(f"/files?limit=3&after={newest['last_id']}")).json()
        oldest = (await client.get("/files?order=asc&purpose=batch")).json()
        outputs = (await client.get("/files?purpose=batch_output")).json()
    assert [one["id"] for one in newest["data"]] == ids[:2:-1]
    assert (newest["first_id"], newest["last_id"], newest["has_more"]) == (ids[4], ids[3], True)
    assert [one["id"] for one in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]
    assert [one["id"] for one in oldest["data"]] == ids
    assert outputs["data"] == []


async def test_nobody_finds_the_file_of_another_key(house: House) -> None:
    async with (
        house.client() as client,
        house.client(await house.new_key_async("other", RateLimits())) as other,
    ):
        mine = (await upload(client)).json()["id"]
        answers = [
            await other.get(f"/files/{mine}"),
            await other.get(f"/files/{mine}/content"),
            await other.delete(f"/files/{mine}"),
        ]
        listed = (await other.get("/files")).json()["data"]
        after = (await other.get(f"/files?after={mine}")).json()["data"]
        absent = await other.get("/files/file-00000000000000000000000000000000")
        kept = await client.get(f"/files/{mine}/content")
    assert {answer.status_code for answer in answers} == {404}
    assert answers[0].text.replace(mine, "") == absent.text.replace(f"file-{'0' * 32}", "")
    assert listed == after == []
    assert kept.content == LINE


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/", "file"),
        ("..", ".."),
        ("a\x1bb.jsonl", "ab.jsonl"),
        ("x" * 300, "x" * 255),
    ],
)
async def test_no_part_of_a_path_is_a_clients(
    on_disk: House, tmp_path: Path, name: str, shown: str
) -> None:
    async with on_disk.client() as client:
        files = {"file": (name, LINE)}
        made = (await client.post("/files", files=files, data=PURPOSE)).json()
    kept = kept_in(tmp_path)
    assert made["filename"] == shown
    assert [path.name for path in kept] == [made["id"]]
    assert kept[0].parent.parent == tmp_path / "files"
    assert kept[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("form", "param"),
    [
        pytest.param({"purpose": "fine-tune"}, "purpose", id="another-purpose"),
        pytest.param({"purpose": ""}, "purpose", id="no-purpose"),
        pytest.param({"expires_after[seconds]": "7200"}, "expires_after", id="no-anchor"),
        pytest.param(
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "expires_after[seconds]",
            id="too-soon",
        ),
    ],
)
async def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(
    on_disk: House, tmp_path: Path, form: dict[str, str], param: str
) -> None:
    async with on_disk.client() as client:
        answer = await upload(client, form=form)
        listed = (await client.get("/files")).json()["data"]
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert listed == []
    assert kept_in(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        pytest.param("application/json", b"{}", 415, id="json"),
        pytest.param("multipart/form-data", b"", 400, id="no-boundary"),
        pytest.param("multipart/form-data; boundary=x", b"no form", 400, id="no-form"),
        pytest.param(
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
            400,
            id="no-end",
        ),
    ],
)
async def test_a_body_that_is_no_form_is_refused(
    house: House, kind: str, body: bytes, status: int
) -> None:
    async with house.client() as client:
        answer = await client.post("/files", content=body, headers={"content-type": kind})
        listed = (await client.get("/files")).json()["data"]
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert listed == []


async def test_a_file_of_201_megabytes_is_refused_while_it_arrives(
    roomy: House, tmp_path: Path
) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(201):
            sent += 1_000_000
            yield b"x" * 1_000_000

    async with roomy.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await client.post("/files", content=body(), headers=headers)
        listed = (await client.get("/files")).json()["data"]
    assert answer.status_code == 413
    assert "200,000,000 bytes" in answer.json()["error"]["message"]
    assert listed == []
    assert kept_in(tmp_path) == []


async def test_a_key_has_a_quota_of_files_and_of_bytes(on_disk: House) -> None:
    async with (
        on_disk.client() as client,
        on_disk.client(await on_disk.new_key_async("other", RateLimits())) as other,
    ):
        full = await upload(client, b"x" * 1025)
        first = await upload(client, b"x" * 1024)
        assert (full.status_code, first.status_code) == (413, 200)
        assert (await upload(client, b"x" * 1000)).status_code == 200
        bytes_left = await upload(client, b"x" * 25)
        assert (await upload(client, b"x" * 24)).status_code == 200
        files_left = await upload(client, b"x")
        assert (await upload(other)).status_code == 200
        await client.delete(f"/files/{first.json()['id']}")
        assert (await upload(client, b"x")).status_code == 200
    for refused in (bytes_left, files_left):
        assert refused.status_code == 400
        assert "Delete some" in refused.json()["error"]["message"]
        assert "at most 3 of 2,048 are kept" in refused.json()["error"]["message"]


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(
    on_disk: House, tmp_path: Path
) -> None:
    says = {"content-type": "multipart/form-data; boundary=B", "content-length": "1000000"}
    async with on_disk.client() as client:
        refused = await client.post("/files", content=b"no form", headers=says)
    assert refused.status_code == 413, "and not 400, which it is once it is read"
    assert "more than 1,024 bytes" in refused.json()["error"]["message"]
    assert kept_in(tmp_path) == []


async def test_a_file_expires_and_its_bytes_go(on_disk: House, tmp_path: Path) -> None:
    async with on_disk.client() as client:
        expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        made = (await upload(client, form=expiry)).json()
        assert made["expires_at"] == made["created_at"] + 3600
        on_disk.clock.move(3599)
        assert (await client.get(f"/files/{made['id']}")).status_code == 200
        on_disk.clock.move(1)
        assert (await client.get(f"/files/{made['id']}")).status_code == 404
    await on_disk.batches.files.sweep()
    assert kept_in(tmp_path) == []


async def test_what_cannot_be_removed_keeps_no_other_file(on_disk: House, tmp_path: Path) -> None:
    async with on_disk.client() as client:
        made = [(await upload(client)).json()["id"] for _ in range(3)]

    class Stubborn(FileStorage):
        def remove(self, key_id: str, name: str) -> None:
            if name == made[0]:
                raise StoreUnavailable("not permitted", retry_after_s=1)
            super().remove(key_id, name)

    on_disk.batches.files.storage = Stubborn(str(tmp_path / "files"))
    on_disk.clock.move(30 * DAY_S)
    await on_disk.batches.files.sweep()
    assert [path.name for path in kept_in(tmp_path)] == made[:1]
    on_disk.batches.files.storage = FileStorage(str(tmp_path / "files"))
    await on_disk.batches.files.sweep()
    assert kept_in(tmp_path) == []


async def test_what_an_upload_that_died_has_left_is_removed_in_a_day(
    on_disk: House, tmp_path: Path
) -> None:
    new = await on_disk.batches.files.begin("key_a", "batch")
    await new.write(b"half of it")
    await new.close()
    on_disk.clock.move(DAY_S - 1)
    await on_disk.batches.files.sweep()
    assert len(kept_in(tmp_path)) == 1
    on_disk.clock.move(2)
    await on_disk.batches.files.sweep()
    assert kept_in(tmp_path) == []


async def test_a_folder_that_cannot_be_written_is_a_503_and_not_for_long(
    roomy: House, tmp_path: Path
) -> None:
    """As root, modes bind nobody: a file lies where the folder of the key should."""
    roomy.batches.files.storage = FileStorage("/dev/null")
    async with roomy.client() as client:
        refused = await upload(client)
        listed = (await client.get("/files")).json()["data"]
        roomy.batches.files.storage = FileStorage(str(tmp_path))
        assert (await upload(client)).status_code == 200
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_unavailable"
    assert "Files cannot be read or written right now: Not a directory" in json.dumps(
        refused.json()
    )
    assert int(refused.headers["retry-after"]) >= 1
    assert listed == []


def test_a_url_without_a_file_system_is_refused_at_the_start_and_not_by_each_upload() -> None:
    with pytest.raises(SettingInvalid, match=r"batch.files is nowhere://a, .* not known: nowhere"):
        FileStorage("nowhere://a")


def test_a_key_of_admin_alone_may_not_upload(house: House) -> None:
    key = house.new_key("admin", scopes=frozenset({Scope.ADMIN}))

    async def ask() -> int:
        async with house.client(key) as client:
            return (await upload(client)).status_code

    assert asyncio.run(ask()) == 403
