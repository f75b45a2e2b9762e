#!/usr/bin/env python3
"""Restores a backup without ops_platform, by docs/reference/repository-format.md alone.

    standalone_restore.py FOLDER TARGET [--backup ID] [--into DIR] [--to TIME]     without --into it lists the backups

FOLDER is a copy of the repository (`aws s3 sync s3://BUCKET/PREFIX FOLDER`). Data keys are opened by Vault (VAULT_ADDR, VAULT_TOKEN,
VAULT_CACERT; OPS_TRANSIT where the key is not transit/ops-backup) or with the key file OPS_KEY_FILE. An incremental backup needs the
pg_combinebackup of its major in PATH. Needs the packages cryptography and zstandard, and lz4 where that was chosen.
"""

import argparse, functools, hashlib, hmac, io, json, os, shutil, ssl, subprocess, tarfile, urllib.request  # noqa: E401, I001
from base64 import b64decode
from pathlib import Path

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def need(holds, text):
    if not holds:
        raise SystemExit(f"cannot restore: {text}")


HERE = {}  # at a second site: the wrapped keys of the first, and each as the key service of the copy wraps it


@functools.cache
def data_key(wrapped):
    """Open a wrapped data key: with the key file, or by asking Vault."""
    wrapped = HERE.get(wrapped, wrapped)
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


def opened(comp, stream):
    """A stream of plain bytes from one that was compressed."""
    if comp == "lz4":
        import lz4.frame

        return lz4.frame.open(stream)
    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) if comp == "zstd" else stream


def unseal(stored, place):
    """Open a sealed object that was read from the key `place`."""
    end = 12 + int.from_bytes(stored[8:12], "big")
    head = json.loads(stored[12:end])
    need(stored[:8] == b"OPSSEAL1" and head["v"] == 1 and head["place"] == place, f"{place}: not what belongs here")
    packed = AESGCM(data_key(head["key"])).decrypt(b64decode(head["nonce"]), stored[end:], stored[:end])
    return opened(head["comp"], io.BytesIO(packed)).read()


def manifest_of(folder, target, backup):
    body = json.loads((folder / f"{target}/backup/{backup}/manifest.json").read_bytes())
    own = body["format"] == 1 and (body["target_id"], body["backup_id"]) == (target, backup)
    need(own, f"{backup}/manifest.json: not its own")
    mac, code = body.pop("mac"), hmac.digest(data_key(body["key"]), b"ops_platform manifest", "sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    need(hmac.compare_digest(mac, hmac.digest(code, text, "sha256").hex()), f"{backup}/manifest.json: it was changed")
    return body


def part(folder, place):
    stored = (folder / place["key"]).read_bytes()
    need(hashlib.sha256(stored).hexdigest() == place["sha256"], f"{place['key']}: other bytes than were written")
    return unseal(stored, place["key"])


class Joined(io.RawIOBase):
    """The blocks of an archive as one file to read from."""

    def __init__(self, pieces):
        self.pieces, self.rest = pieces, b""

    def read(self, size=-1):
        self.rest = self.rest or next(self.pieces, b"")
        given, self.rest = self.rest[:size], self.rest[size:]
        return given


def restore_files(folder, manifest, into):
    """One backup's files. Each tablespace goes beside the data directory, as DIR.OID; returns these by oid."""
    spaces = {a["oid"]: Path(f"{into}.{a['oid']}") for a in manifest["archives"] if a["oid"] is not None}
    for archive in manifest["archives"]:
        place = spaces.get(archive["oid"], into)
        place.mkdir(mode=0o700, parents=True)  # fails where it exists: nothing is restored over files
        stream = Joined(part(folder, block) for block in archive["blocks"])
        if manifest["compress_at"] == "server":
            stream = opened(manifest["compression"], stream)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not member.issym():  # links to tablespaces, which are made below
                    tar.extract(member, place, filter="data")
    for oid, place in spaces.items():
        (into / "pg_tblspc" / str(oid)).symlink_to(place.absolute())
    (into / "tablespace_map").unlink(missing_ok=True)
    (into / "backup_manifest").write_bytes(part(folder, manifest["pg_manifest"]))
    return spaces


def restore_chain(folder, chain, into):
    """A full backup; or each one of a chain in a folder of its own, then put together by PostgreSQL's program."""
    if len(chain) == 1:
        return restore_files(folder, chain[0], into)
    need(program := shutil.which("pg_combinebackup"), "it is incremental, and pg_combinebackup is not in PATH")
    parts = [Path(f"{into}.parts") / manifest["backup_id"] for manifest in chain]
    spaces = [restore_files(folder, manifest, place) for manifest, place in zip(chain, parts, strict=True)][-1]
    moved = [f"--tablespace-mapping={place.absolute()}={into.absolute()}.{oid}" for oid, place in spaces.items()]
    subprocess.run([program, *parts, "-o", into, *moved], check=True)
    return shutil.rmtree(f"{into}.parts")


def restore_wal(folder, manifest, into):
    """All WAL from the backup's start on as plain files for `restore_command`, without a hole in what the backup needs."""
    size, timeline = manifest["wal_segment_size"], f"{manifest['timeline']:08X}"
    halves = [[int(half, 16) for half in manifest[name].split("/")] for name in ("start_lsn", "end_lsn")]
    first, end = (((high << 32) + low - last) // size for last, (high, low) in enumerate(halves))
    places = [divmod(number, (1 << 32) // size) for number in range(first, end + 1)]
    needed = [f"{timeline}{high:08X}{low:08X}" for high, low in places]
    into.mkdir(mode=0o700)
    for file in sorted((folder / f"{manifest['target_id']}/wal/{manifest['system_identifier']}").rglob("*")):
        name = file.name.removesuffix(".partial")  # a whole segment comes before its .partial
        segment = len(name) == 24 and name[8:] >= needed[0][8:]
        if (segment or name.endswith(".history")) and not (
            into / name
        ).exists():  # the others are old, or notes of gaps
            plain = unseal(file.read_bytes(), str(file.relative_to(folder)))
            (into / name).write_bytes(plain.ljust(size, b"\0") if segment else plain)
    for name in needed:
        need((into / name).exists(), f"the backup needs the WAL segment {name}, which is not there")


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "target", "--backup", "--into", "--to"):
        ask.add_argument(name)
    args = ask.parse_args()
    folder = Path(args.folder)
    held = [json.loads(file.read_bytes()) for file in (folder / args.target / "keys").glob("*.json")]
    HERE.update({entry["wrapped"]: entry["here"] for entry in held})
    names = [file.parent.name for file in (folder / args.target / "backup").glob("*/manifest.json")]
    backups = [manifest_of(folder, args.target, name) for name in names if args.backup in (None, name)]
    backups.sort(key=lambda manifest: manifest["started_at"])
    need(backups, f"there is no such backup of {args.target}")
    if not args.into:
        print("\n".join(f"{m['backup_id']} {m['ended_at']} {m['kind']} {m['raw']} bytes" for m in backups))
        return
    into, wal, chain = Path(args.into), Path(f"{args.into}.wal").absolute(), backups[-1:]
    while chain[0]["parent_id"]:
        chain.insert(0, manifest_of(folder, args.target, chain[0]["parent_id"]))
    restore_wal(folder, chain[-1], wal)
    restore_chain(folder, chain, into)
    target = f"recovery_target_time = '{args.to}'\nrecovery_target_action = 'promote'\n" if args.to else ""
    with (into / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"\nrestore_command = 'cp \"{wal}/%f\" \"%p\"'\narchive_mode = 'off'\n{target}")
    (into / "standby.signal").unlink(missing_ok=True)
    (into / "recovery.signal").touch()
    print(f"restored {chain[-1]['backup_id']}\nnext: chown -R postgres {into}*; pg_ctl -D {into.absolute()} start")


if __name__ == "__main__":
    main()
