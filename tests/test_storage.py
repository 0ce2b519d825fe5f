"""Folders on disk and in S3 keep the same promises."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from iir_dist.errors import InputError, NotFoundError, StorageError, UnreachableError
from iir_dist.storage import Folder, LocalFolder, S3Folder, open_folder, s3_client, sha256_of, split_uri


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return open_folder(tmp_path / "store")
    return open_folder(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def names(folder: Folder, prefix: str = "") -> list[str]:
    return [entry.name for entry in folder.list(prefix)]


def test_write_read_list_delete(folder: Folder) -> None:
    assert names(folder) == []
    folder.write("b/two.txt", b"22")
    folder.write("a.txt", b"1")
    folder.write("a.txt", b"111")
    assert folder.read("a.txt") == b"111"
    assert [(e.name, e.size) for e in folder.list()] == [("a.txt", 3), ("b/two.txt", 2)]
    assert names(folder, "b/") == ["b/two.txt"]
    assert folder.exists("a.txt")
    assert not folder.exists("a")
    folder.delete("a.txt")
    folder.delete("a.txt")
    assert names(folder) == ["b/two.txt"]
    folder.delete_all("b/")
    assert names(folder) == []
    with pytest.raises(NotFoundError, match=r"a\.txt"):
        folder.read("a.txt")


def test_publish_gives_size_and_digest_and_leaves_nothing_else(folder: Folder) -> None:
    with folder.publish("data.bin") as file:
        file.path.write_bytes(b"x" * 100_000)
    assert (file.size, len(file.sha256)) == (100_000, 64)
    with folder.local("data.bin") as path:
        assert sha256_of(path) == file.sha256
    assert names(folder) == ["data.bin"]


def test_a_failed_publish_leaves_the_old_file(folder: Folder) -> None:
    folder.write("data.bin", b"old")
    with pytest.raises(ZeroDivisionError), folder.publish("data.bin") as file:
        file.path.write_bytes(b"half")
        raise ZeroDivisionError
    assert folder.read("data.bin") == b"old"
    assert names(folder) == ["data.bin"]


def test_of_many_creators_one_wins(folder: Folder) -> None:
    results: list[bool] = []

    def create(number: int) -> None:
        results.append(folder.create("manifest.json", str(number).encode()))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    assert names(folder) == ["manifest.json"]


def test_seekable_reader(folder: Folder) -> None:
    data = os.urandom(50_000)
    folder.write("data.bin", data)
    with folder.open("data.bin") as file:
        assert file.read(10) == data[:10]
        file.seek(-100, os.SEEK_END)
        assert file.read() == data[-100:]
        assert file.read() == b""
        file.seek(20_000)
        assert file.read(30_000) == data[20_000:]


def test_folders_pickle_and_nest(folder: Folder) -> None:
    folder.child("inner").write("x", b"1")
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301 - our own bytes
    assert again.read("inner/x") == b"1"


def test_addresses() -> None:
    assert open_folder("file:///tmp/a%20b").uri == "/tmp/a b"
    assert isinstance(open_folder("/tmp"), LocalFolder)
    s3 = open_folder("s3://bucket/some/prefix/")
    assert isinstance(s3, S3Folder)
    assert (s3.bucket, s3.prefix, s3.uri) == ("bucket", "some/prefix", "s3://bucket/some/prefix")
    inner, name = split_uri("s3://bucket/some/file.tar")
    assert (inner.uri, name) == ("s3://bucket/some", "file.tar")
    for wrong, part in (("gs://x/y", "'gs'"), ("s3:///y", "no bucket"), ("", "empty")):
        with pytest.raises(InputError, match=part):
            open_folder(wrong)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    with pytest.raises(StorageError, match="no space left"), folder.publish("x") as file:
        file.path.symlink_to("/dev/full")
        file.path.write_bytes(b"data")
    assert names(folder) == []


def test_a_file_in_place_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot use"):
        LocalFolder(tmp_path / "file").write("x", b"1")


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("AWS_ACCESS_KEY_ID", "someone-else", "AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-value", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "AWS_ENDPOINT_URL"),
    ],
)
def test_s3_errors_name_bucket_and_variable_and_no_secret(
    s3: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("IIR_STORAGE_PATIENCE_SEC", "0.5")
    s3_client.cache_clear()
    try:
        with pytest.raises(StorageError) as error:
            open_folder(s3).read("x")
    finally:
        s3_client.cache_clear()
    assert "'test'" in str(error.value)
    assert remedy in str(error.value)
    assert "secret-value" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "status", "kind", "part"),
    [
        ("AccessDenied", 403, StorageError, "lacks the permission"),
        ("403", 403, StorageError, "check AWS_ACCESS_KEY_ID"),
        ("ExpiredToken", 400, StorageError, "renew AWS_SESSION_TOKEN"),
        ("RequestTimeTooSkewed", 403, StorageError, "this machine's clock"),
        ("NoSuchKey", 404, NotFoundError, "does not exist"),
        ("SlowDown", 503, UnreachableError, "overloaded"),
        ("", 502, UnreachableError, "it answered 502"),
        ("MovedPermanently", 301, StorageError, "the store answered MovedPermanently"),
    ],
)
def test_what_a_store_may_answer(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int, kind: type[StorageError], part: str
) -> None:
    from botocore.exceptions import ClientError

    from iir_dist.storage import s3

    class Client:
        asked = 0

        def get_object(self, **_: str) -> None:
            self.asked += 1
            body = {
                "Error": {"Code": code, "Message": "key AKIDSECRET"},
                "ResponseMetadata": {"HTTPStatusCode": status},
            }
            raise ClientError(body, "GetObject")  # type: ignore[arg-type]

    client = Client()
    monkeypatch.setattr(s3, "s3_client", lambda: client)
    monkeypatch.setenv("IIR_STORAGE_PATIENCE_SEC", "0.3")
    with pytest.raises(StorageError, match=part) as error:
        open_folder("s3://photos/x").read("a")
    assert type(error.value) is kind
    assert "AKIDSECRET" not in str(error.value)
    assert "s3://photos/x/a" in str(error.value)
    assert (client.asked > 1) == (kind is UnreachableError)  # what will not pass is not asked for again


@pytest.mark.s3
def test_a_missing_bucket(s3: str) -> None:
    with pytest.raises(StorageError, match=r"no-such-bucket.*does not exist"):
        list(open_folder("s3://no-such-bucket/x").list())


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3_client.cache_clear()
    try:
        with pytest.raises(StorageError, match=r"bucket 'b'.*AWS_ACCESS_KEY_ID"):
            open_folder("s3://b").read("x")
    finally:
        s3_client.cache_clear()
