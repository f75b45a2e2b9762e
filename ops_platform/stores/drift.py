"""Drift between Git and a cluster: what Git has and the cluster lacks, what it has besides in namespaces that Git manages, what differs.

Only fields that Git states are compared: what the server and its controllers fill in is nobody's drift. No value is shown, a secret's least.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ops_platform.clients.kubernetes_objects import Resource
from ops_platform.errors import NotThereError, OpsError, UsageError
from ops_platform.stores.git import checkout
from ops_platform.stores.kubernetes import is_made_by_the_server, ordered

if TYPE_CHECKING:
    from ops_platform.clients.access import Access
    from ops_platform.clients.kubernetes import Kubernetes
    from ops_platform.inventory.model import Inventory
    from ops_platform.inventory.systems import KubernetesSystem, Manifests

Json = dict[str, Any]
_SUFFIXES = (".yaml", ".yml", ".json")
# Of these the server writes an amount in its own way: 1000m is 1.
_AMOUNTS = ("requests", "limits", "capacity", "hard", "storage", "cpu", "memory", "sizeLimit", "divisor")
_SHOWN = 50


@dataclass(frozen=True)
class Changed:
    """`fields`: paths of what Git states and the cluster does not have so."""

    object: str
    fields: list[str]


@dataclass(frozen=True)
class Drift:
    """`commits`: by `SYSTEM/REPOSITORY@REF`, what Git was looked at. Objects are named `plural.group namespace/name`."""

    system_id: str
    commits: dict[str, str]
    compared: int
    missing: list[str] = field(default_factory=list[str])
    extra: list[str] = field(default_factory=list[str])
    changed: list[Changed] = field(default_factory=list[Changed])

    @property
    def none(self) -> bool:
        return not (self.missing or self.extra or self.changed)

    def lines(self) -> list[str]:
        """For people."""
        at = ", ".join(f"{name} {commit[:12]}" for name, commit in self.commits.items())
        if self.none:
            return [f"{self.system_id}: {self.compared} objects are as in Git ({at})"]
        rows = [
            *(f"  missing  {name}" for name in self.missing),
            *(f"  extra    {name}" for name in self.extra),
            *(f"  changed  {one.object}: {', '.join(one.fields[:5])}" for one in self.changed),
        ]
        more = [f"  and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
        return [
            f"{self.system_id}: {len(rows)} of {self.compared} objects are not as in Git ({at})",
            *rows[:_SHOWN],
            *more,
        ]


def with_manifests(inventory: Inventory) -> list[KubernetesSystem]:
    """The clusters of which Git says something."""
    return [system for system in inventory.systems if system.kind == "kubernetes" and system.manifests]


def find_drift(access: Access, system: KubernetesSystem) -> Drift:
    """Read Git, then the cluster. Raises UsageError for manifests that are none, and whatever keeps either from being read."""
    if not system.manifests:
        raise UsageError(
            f"{system.id} names no manifests", remedy="declare manifests: its Git repository, ref and path"
        )
    commits: dict[str, str] = {}
    stated: list[Json] = []
    for manifests in system.manifests:
        stated += _of_git(access, manifests, commits)
    if not stated:
        raise NotThereError("there are no manifests in Git", where=", ".join(commits), remedy="correct manifests.path")
    patterns = [pattern for manifests in system.manifests for pattern in manifests.namespaces]
    return compare(access.kubernetes(system), system.id, stated, patterns, commits)


def compare(
    cluster: Kubernetes, system_id: str, stated: Sequence[Json], patterns: Sequence[str], commits: dict[str, str]
) -> Drift:
    """What the objects that Git states are in the cluster. `patterns`: of the namespaces that Git manages alone."""
    resources = cluster.resources()
    kinds = {(one.group, one.kind): one for one in resources}
    out, known = Drift(system_id, commits, len(stated)), set[str]()
    for manifest in stated:
        resource = _resource(kinds, manifest)
        if resource is None:
            # A cluster without the definition has none of its objects.
            out.missing.append(f"{manifest['kind']} {manifest['metadata']['name']}: the cluster has no such kind")
            continue
        namespace = manifest["metadata"].get("namespace", "default") if resource.namespaced else None
        name = _name(resource, namespace, manifest["metadata"]["name"])
        if name in known:
            raise UsageError(f"{name} stands in Git twice", where=", ".join(commits), remedy="remove one of them")
        known.add(name)
        here = cluster.find(resource, manifest["metadata"]["name"], namespace)
        if here is None:
            out.missing.append(name)
        elif fields := stated_differences(as_server(manifest), here):
            out.changed.append(Changed(name, fields))
    out.extra.extend(sorted(set(_managed(cluster, resources, patterns)) - known))
    return out


def _resource(kinds: Mapping[tuple[str, str], Resource], manifest: Json) -> Resource | None:
    """In the version that Git writes: fields of another one may have other names."""
    group, _, version = str(manifest["apiVersion"]).rpartition("/")
    found = kinds.get((group, manifest["kind"]))
    return Resource(group, version, found.plural, found.kind, found.namespaced) if found else None


def _managed(cluster: Kubernetes, resources: Iterable[Resource], patterns: Sequence[str]) -> Iterator[str]:
    """Every object in the namespaces that Git manages; what something else makes of it is not Git's."""
    if not patterns:
        return
    for resource in ordered(resources):
        if not resource.namespaced:
            continue
        for found in cluster.list(resource):
            namespace = found["metadata"]["namespace"]
            if not any(fnmatchcase(namespace, pattern) for pattern in patterns):
                continue
            if not (is_made_by_the_server(resource.kind, found) or found["metadata"].get("ownerReferences")):
                yield _name(resource, namespace, found["metadata"]["name"])


def _name(resource: Resource, namespace: str | None, name: str) -> str:
    kind = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


# Git


def _of_git(access: Access, manifests: Manifests, commits: dict[str, str]) -> list[Json]:
    from ops_platform.inventory.systems import GitSystem

    system = access.inventory.system(manifests.git, GitSystem)
    repository = next((one for one in system.repositories if one.name == manifests.repository), None)
    if repository is None:
        raise UsageError(f"{system.id} has no repository {manifests.repository}", remedy="correct manifests.repository")
    token = access.secret(system.token).reveal() if system.token else None
    with tempfile.TemporaryDirectory(prefix="ops-git-") as folder:
        place = Path(folder) / "clone"
        commits[f"{system.id}/{repository.name}@{manifests.ref}"] = checkout(
            repository.url, manifests.ref, place, token
        )
        return list(read_manifests(place, place / manifests.path))


def read_manifests(root: Path, folder: Path) -> Iterator[Json]:
    """Every object in the files below `folder`. Raises UsageError for a file that holds something else: it is not passed over."""
    import yaml

    if not folder.is_dir():
        raise NotThereError(f"there is no folder {folder.relative_to(root)} in Git", remedy="correct manifests.path")
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(root)
        if file.suffix not in _SUFFIXES or ".git" in place.parts or file.is_symlink() or not file.is_file():
            continue
        try:
            for document in yaml.safe_load_all(file.read_text("utf-8")):
                yield from _objects(document, str(place))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark is not None else ""
            raise UsageError(f"{place}{line} cannot be read as YAML", remedy=_RENDER) from None


_RENDER = "manifests have to be rendered: let the tool that does so commit what it makes, and name that folder"


def _objects(document: Any, where: str) -> Iterator[Json]:
    if document is None:
        return
    found = cast("Json", document) if isinstance(document, dict) else {}
    if str(found.get("kind", "")).endswith("List") and isinstance(found.get("items"), list):
        for item in found["items"]:
            yield from _objects(item, where)
        return
    metadata = found.get("metadata")
    named = isinstance(metadata, dict) and isinstance(cast("Json", metadata).get("name"), str)
    if not (isinstance(found.get("apiVersion"), str) and isinstance(found.get("kind"), str) and named):
        raise UsageError(f"{where} holds something that is no object with a kind and a name", remedy=_RENDER)
    # As the API would take it: dates of YAML are text there.
    yield json.loads(json.dumps(found, default=str))


# Fields


def as_server(manifest: Json) -> Json:
    """Without what says nothing of the object as it is, and with what the server makes of what may only be written."""
    import base64

    out = {key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "status")}
    out["metadata"] = {
        key: value for key, value in manifest["metadata"].items() if key in ("name", "labels", "annotations")
    }
    if manifest["kind"] == "Secret" and isinstance(out.get("stringData"), dict):
        texts = out.pop("stringData")
        out["data"] = {
            **(out.get("data") or {}),
            **{k: base64.b64encode(str(v).encode()).decode() for k, v in texts.items()},
        }
    return out


def stated_differences(stated: Any, here: Any, at: str = "") -> list[str]:
    """The paths of `stated` at which `here` is not the same. Elements that have a name are found by it, wherever they stand."""
    if isinstance(stated, dict):
        left, right = cast("Json", stated), cast("Json", here) if isinstance(here, dict) else {}
        return [
            path
            for key, value in left.items()
            for path in stated_differences(value, right.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(stated, list) and stated:
        wanted = cast("list[Any]", stated)
        found = cast("list[Any]", here) if isinstance(here, list) else []
        if all(isinstance(one, dict) and "name" in one for one in (*wanted, *found)):
            by_name = {one["name"]: one for one in found}
            more = by_name.keys() - {one["name"] for one in wanted}
            return [
                *(
                    p
                    for one in wanted
                    for p in stated_differences(one, by_name.get(one["name"]), f"{at}[{one['name']}]")
                ),
                *(f"{at}[{name}]" for name in sorted(more)),
            ]
        if len(wanted) != len(found):
            return [at]
        pairs = enumerate(zip(wanted, found, strict=True))
        return [path for number, (one, other) in pairs for path in stated_differences(one, other, f"{at}[{number}]")]
    same = stated == here or (stated in (None, {}, []) and here in (None, {}, []))
    return [] if same or _is_same_amount(stated, here, at) else [at]


def _is_same_amount(stated: Any, here: Any, at: str) -> bool:
    if not any(part in _AMOUNTS for part in at.replace("[", ".").split(".")):
        return False
    from kubernetes.utils.quantity import parse_quantity

    try:
        return parse_quantity(str(stated)) == parse_quantity(str(here))
    except (ValueError, OpsError):
        return False
