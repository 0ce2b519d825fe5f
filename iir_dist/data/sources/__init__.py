"""Where raw images come from: folders, archives and lists, on local disk, in S3 or at an http(s) address.

A source lists its members (key, size, where the bytes lie) and reads one member at a time, so that any worker can
read any member; nothing is unpacked to disk.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from iir_dist.data import downloads
from iir_dist.data.sources.archives import (
    ENDINGS,
    OPENERS,
    TAR,
    ArchiveSource,
    StreamSource,
    TarSource,
    ZipSource,
)
from iir_dist.data.sources.loose import LISTS, WEB, FolderSource, ListSource
from iir_dist.data.sources.member import Member, Source, clean, hidden, image_names, is_image, is_unsafe
from iir_dist.errors import InputError

__all__ = [
    "ENDINGS",
    "ArchiveSource",
    "FolderSource",
    "Member",
    "Source",
    "clean",
    "hidden",
    "image_names",
    "is_image",
    "is_unsafe",
    "open_source",
]

OTHERS = (".7z", ".rar", ".tar.lz4", ".tar.lzma", ".tar.z")


def open_source(uri: str) -> Source:
    """The source at an address: an archive or a list by its ending, else a folder.

    An archive at an http(s) address is fetched to this machine first; `#sha256=…` or `#md5=…` behind it is checked.

    Raises:
        InputError: nothing here can read it.
    """
    address, _, fragment = uri.partition("#") if uri.startswith(WEB) else (uri, "", "")
    ending = address.lower()
    if ending.endswith(OTHERS):
        raise InputError(f"{uri}: this kind of archive cannot be read; repack it as .tar, .tar.gz, .tar.zst or .zip")
    if ending.endswith(ENDINGS):
        path, content = None, ""
        if uri.startswith(WEB):
            # A folder for each host: many an archive is called images.tar.
            folder = downloads.downloads_folder() / downloads.file_name(f"/{urlsplit(address).hostname}")
            path = downloads.fetch(address, folder, fragment.replace("=", ":", 1) or None)
            content = downloads.content_of(path)
        if ending.endswith(tuple(OPENERS)):
            return StreamSource(uri, path, content)
        return TarSource(uri, path, content) if ending.endswith(TAR) else ZipSource(uri, path, content)
    if uri.startswith(WEB):
        raise InputError(f"{uri}: only archives are fetched by http(s); expected one ending in {', '.join(ENDINGS)}")
    return ListSource(uri) if ending.endswith(LISTS) else FolderSource(uri)
