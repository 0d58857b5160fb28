"""As much of Kustomize as deploy/k8s uses, for machines without kubectl; a test compares the two where kubectl is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


def render(directory: Path) -> list[Object]:
    """All objects of a kustomization."""
    spec = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = spec.keys() - {
        "apiVersion",
        "kind",
        "namespace",
        "resources",
        "configMapGenerator",
        "generatorOptions",
        "patches",
    }
    assert not unknown, f"this renderer does not know {unknown}"
    objects: list[Object] = []
    for resource in spec["resources"]:
        path = directory / resource
        objects += render(path) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text()) if one]
    for generator in spec.get("configMapGenerator", ()):
        data = {name: (directory / name).read_text() for name in generator["files"]}
        if generator.get("behavior") == "replace":
            old = next(o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] == generator["name"])
            old["data"] = data
        else:
            meta = {"name": generator["name"]}
            objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    for entry in spec.get("patches", ()):
        text = entry["patch"] if "patch" in entry else (directory / entry["path"]).read_text()
        target = entry["target"]
        matching = [o for o in objects if o["kind"] == target["kind"] and o["metadata"]["name"] == target["name"]]
        assert matching, f"{target} is not among the resources"
        for one in matching:
            for operation in yaml.safe_load(text):
                apply(one, operation)
    if "namespace" in spec:
        for one in objects:
            if one["kind"] != "Namespace":
                one["metadata"]["namespace"] = spec["namespace"]
    return objects


def apply(document: Object, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902, in place."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    parent: Any = document
    for part in path:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    key: Any = int(last) if isinstance(parent, list) else last
    if operation["op"] == "replace":
        assert key in parent or isinstance(parent, list), f"{operation['path']} does not exist"
    else:
        assert operation["op"] == "add" and isinstance(parent, dict), operation
    parent[key] = copy.deepcopy(operation["value"])
