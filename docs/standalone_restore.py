#!/usr/bin/env python3
"""Restores a backup without ops_platform, by docs/reference/repository-format.md alone.

    standalone_restore.py SOURCE TARGET                        lists the backups of a target
    standalone_restore.py SOURCE TARGET --into DIR             restores the newest one, or --backup ID; --to TIME with its zone

SOURCE is s3://BUCKET/PREFIX (read with boto3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_CA_BUNDLE …) or a
folder with a copy of what stands below the prefix. Data keys are opened by Vault (VAULT_ADDR, VAULT_TOKEN, VAULT_CACERT; OPS_TRANSIT
where the key is not transit/ops-backup) or with the key file that OPS_KEY_FILE names. An incremental backup needs the
pg_combinebackup of its major in PATH. Needs the packages cryptography and zstandard; lz4 where lz4 was chosen; boto3 for S3.
"""

import argparse
import functools
import hashlib
import hmac
import io
import json
import os
import shutil
import ssl
import subprocess
import tarfile
import urllib.request
from base64 import b64decode
from pathlib import Path

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def need(holds, text):
    if not holds:
        raise SystemExit(f"cannot restore: {text}")


def lz4(stream):
    import lz4.frame

    return lz4.frame.open(stream)


class Store:
    """`get` and `list` over a folder or a bucket."""

    def __init__(self, source):
        self.bucket, _, prefix = source.removeprefix("s3://").partition("/")
        self.folder = None if source.startswith("s3://") else Path(source)
        self.prefix = f"{prefix.strip('/')}/" if prefix else ""
        if self.folder is None:
            import boto3

            self.s3 = boto3.client("s3")

    def get(self, key):
        if self.folder is not None:
            return (self.folder / key).read_bytes()
        return self.s3.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()

    def list(self, prefix):
        if self.folder is not None:
            files = (self.folder / prefix).rglob("*")
            return sorted(str(file.relative_to(self.folder)) for file in files if file.is_file())
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        return [item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", [])]


@functools.cache
def data_key(wrapped):
    """Open a wrapped data key: with the key file, or by asking Vault."""
    if wrapped.startswith("file:v1:"):
        raw, master = b64decode(wrapped[8:]), bytes.fromhex(Path(os.environ["OPS_KEY_FILE"]).read_text().strip())
        return AESGCM(master).decrypt(raw[:12], raw[12:], b"ops_platform data key")
    mount, _, name = os.environ.get("OPS_TRANSIT", "transit/ops-backup").rpartition("/")
    headers = {"X-Vault-Token": os.environ["VAULT_TOKEN"], "X-Vault-Namespace": os.environ.get("VAULT_NAMESPACE", "")}
    address = f"{os.environ['VAULT_ADDR'].rstrip('/')}/v1/{mount}/decrypt/{name}"
    request = urllib.request.Request(address, json.dumps({"ciphertext": wrapped}).encode(), headers)
    tls = ssl.create_default_context(cafile=os.environ.get("VAULT_CACERT"))
    with urllib.request.urlopen(request, timeout=30, context=tls) as answer:
        return b64decode(json.load(answer)["data"]["plaintext"])


def unseal(stored, place):
    """Open a sealed object that was read from the key `place`."""
    end = 12 + int.from_bytes(stored[8:12], "big")
    head = json.loads(stored[12:end])
    need(stored[:8] == b"OPSSEAL1" and head["v"] == 1 and head["place"] == place, f"{place}: not what belongs here")
    packed = AESGCM(data_key(head["key"])).decrypt(b64decode(head["nonce"]), stored[end:], stored[:end])
    if head["comp"] == "zstd":
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=head["raw"])
    return lz4(io.BytesIO(packed)).read() if head["comp"] == "lz4" else packed


def manifest_of(store, target, backup):
    key = f"{target}/backup/{backup}/manifest.json"
    body = json.loads(store.get(key))
    need(body["format"] == 1 and (body["target_id"], body["backup_id"]) == (target, backup), f"{key}: not its own")
    mac, code = body.pop("mac"), hmac.new(data_key(body["key"]), b"ops_platform manifest", hashlib.sha256).digest()
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    need(hmac.compare_digest(mac, hmac.new(code, text, hashlib.sha256).hexdigest()), f"{key}: it was changed")
    return body


def part(store, place):
    stored = store.get(place["key"])
    need(hashlib.sha256(stored).hexdigest() == place["sha256"], f"{place['key']}: other bytes than were written")
    return unseal(stored, place["key"])


class Joined:
    """The blocks of an archive as one file to read from."""

    def __init__(self, pieces):
        self.pieces, self.rest = pieces, b""

    def read(self, size):
        self.rest = self.rest or next(self.pieces, b"")
        given, self.rest = self.rest[:size], self.rest[size:]
        return given


def restore_files(store, manifest, into):
    """One backup's files. Each tablespace goes beside the data directory, as DIR.OID; returns these by oid."""
    spaces = {a["oid"]: Path(f"{into}.{a['oid']}") for a in manifest["archives"] if a["oid"] is not None}
    for archive in manifest["archives"]:
        place = spaces.get(archive["oid"], into)
        place.mkdir(mode=0o700, parents=True)  # fails where it exists: nothing is restored over files
        stream = Joined(part(store, block) for block in archive["blocks"])
        if manifest["compress_at"] == "server":
            zstd = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
            stream = zstd if manifest["compression"] == "zstd" else lz4(stream)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not member.issym():  # links to tablespaces, which are made below
                    tar.extract(member, place, filter="data")
    for oid, place in spaces.items():
        (into / "pg_tblspc" / str(oid)).symlink_to(place.absolute())
    (into / "tablespace_map").unlink(missing_ok=True)
    (into / "backup_manifest").write_bytes(part(store, manifest["pg_manifest"]))
    return spaces


def restore_chain(store, chain, into):
    """A full backup; or each one of a chain in a folder of its own, then put together by PostgreSQL's program."""
    if len(chain) == 1:
        return restore_files(store, chain[0], into)
    program = shutil.which("pg_combinebackup")
    need(program, "this is an incremental backup, and pg_combinebackup is not in PATH")
    folders = [Path(f"{into}.parts") / manifest["backup_id"] for manifest in chain]
    spaces = [restore_files(store, manifest, folder) for manifest, folder in zip(chain, folders, strict=True)][-1]
    moved = [f"--tablespace-mapping={place.absolute()}={into.absolute()}.{oid}" for oid, place in spaces.items()]
    subprocess.run([program, *folders, "-o", into, *moved], check=True)
    return shutil.rmtree(f"{into}.parts")


def position(lsn):
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def restore_wal(store, manifest, folder):
    """All WAL from the backup's start on, without a hole, as plain files for `restore_command`."""
    size = manifest["wal_segment_size"]
    first, last = position(manifest["start_lsn"]) // size, (position(manifest["end_lsn"]) - 1) // size
    files = {}
    for key in store.list(f"{manifest['target_id']}/wal/{manifest['system_identifier']}/"):
        name = key.rpartition("/")[2].removesuffix(".partial")
        if len(name) == 24 or name.endswith(".history"):  # the others are notes of gaps
            files.setdefault(name, key)  # a whole segment is listed before its .partial
    per_id = (1 << 32) // size
    numbers = {name: int(name[8:16], 16) * per_id + int(name[16:], 16) for name in files if len(name) == 24}
    for number in range(first, last + 1):
        name = f"{manifest['timeline']:08X}{number // per_id:08X}{number % per_id:08X}"
        need(name in files, f"the backup needs the WAL segment {name}, which is not there")
    there = set(numbers.values())
    end = next(number for number in range(first, max(there) + 2) if number not in there)
    folder.mkdir(mode=0o700)
    for name, key in files.items():
        if first <= numbers.get(name, first) < end:
            plain = unseal(store.get(key), key)
            (folder / name).write_bytes(plain.ljust(size, b"\0") if name in numbers else plain)
    if later := sorted(name for name, number in numbers.items() if number > end):
        print(f"the archive has a hole before {later[0]}: what was written after it cannot be recovered")


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "--backup", "--into", "--to"):
        ask.add_argument(name)
    args = ask.parse_args()
    store = Store(args.source)
    names = [key.split("/")[2] for key in store.list(f"{args.target}/backup/") if key.endswith("/manifest.json")]
    manifests = [manifest_of(store, args.target, name) for name in names if args.backup in (None, name)]
    backups = sorted(manifests, key=lambda manifest: manifest["started_at"])
    need(backups, f"there is no such backup of {args.target}")
    if not args.into:
        for manifest in backups:
            print(manifest["backup_id"], manifest["ended_at"], manifest["kind"], f"{manifest['raw']} bytes")
        return
    into, wal = Path(args.into), Path(f"{args.into}.wal").absolute()
    chain = backups[-1:]
    while chain[0]["parent_id"]:
        chain.insert(0, manifest_of(store, args.target, chain[0]["parent_id"]))
    restore_wal(store, chain[-1], wal)
    restore_chain(store, chain, into)
    target = f"recovery_target_time = '{args.to}'\nrecovery_target_action = 'promote'\n" if args.to else ""
    with (into / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"\nrestore_command = 'cp \"{wal}/%f\" \"%p\"'\narchive_mode = 'off'\n{target}")
    (into / "standby.signal").unlink(missing_ok=True)
    (into / "recovery.signal").touch()
    print(f"restored {chain[-1]['backup_id']}\nnext: chown -R postgres {into}*; pg_ctl -D {into.absolute()} start")


if __name__ == "__main__":
    main()
