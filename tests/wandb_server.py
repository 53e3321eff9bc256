"""A stand-in on this machine for the Weights & Biases server: enough for the real client (0.31) and its wandb-core.

It keeps what the client sends in `server.runs` and answers from there. What it is asked for and cannot answer is listed
in `server.unknown`. `down`, `busy`, `deny` and `forbidden` make it fail. Sweeps are in `server.sweeps`: a grid is
enumerated as W&B does it; other methods have no engine here and try what `server.points` lists.
"""

import base64
import gzip
import hashlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import yaml

USER = "tester"  # whose key it is; also the default entity
API_KEY = "k" * 40  # any 40 characters will do
CREATED = datetime(2030, 1, 1, tzinfo=UTC).isoformat()  # of everything
HISTORY, EVENTS, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json"
MANIFEST = ""  # the name an artifact's manifest is kept under, next to its files


class NotEmulated(Exception):
    """What the client asked for is beyond this server."""


@dataclass(eq=False)
class Artifact:
    """One version of an artifact. When the client commits it, it gets its number (v0, v1, …) and its aliases."""

    server_id: str
    run: "Run" = field(repr=False)
    name: str
    type: str
    digest: str
    aliases: list[str]
    metadata: str | None = None  # JSON
    description: str | None = None
    version: int | None = None
    uploads: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> dict[str, bytes]:
        """What its manifest lists and was uploaded."""
        manifest = json.loads(self.uploads.get(MANIFEST, b'{"contents": {}}'))
        return {name: self.uploads[name] for name in manifest["contents"] if name in self.uploads}


@dataclass(eq=False)
class Run:
    """A run as the server sees it."""

    server_id: str
    entity: str
    project: str
    id: str
    display_name: str
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    state: str = "running"  # then finished, or failed
    tags: list[str] = field(default_factory=list)
    raw_config: dict[str, dict] = field(default_factory=dict)  # {name: {"value": …}}
    summary: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file: number of the line: line
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)  # which it logged
    sweep: str | None = None  # the sweep it belongs to

    @property
    def config(self) -> dict[str, Any]:
        """The user's part of the config: the client adds its own under `_wandb`."""
        return {name: entry["value"] for name, entry in self.raw_config.items() if name != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged rows by step. What is logged at one step, the client itself merges into one row."""
        return sorted(map(json.loads, self.lines(HISTORY)), key=lambda row: row["_step"])

    def lines(self, stream: str) -> list[str]:
        """The lines of a file of the run's file stream, in order."""
        return [line for _, line in sorted(self.streams.get(stream, {}).items())]


@dataclass(eq=False)
class Sweep:
    """A sweep: what its runs are to try, and which of them shall stop."""

    server_id: str
    entity: str
    project: str
    id: str
    config: dict[str, Any]
    points: Iterator[dict[str, Any]] = field(repr=False)  # the parameters of runs to come
    state: str = "RUNNING"  # PAUSED, CANCELED, FINISHED
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # handed to agents: id of the run: its parameters
    agents: list[str] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    told: list[tuple[str, str]] = field(default_factory=list)  # type of every command and the run it is about

    def stop(self, run_id: str) -> None:
        """From now on its agent is told to stop this run."""
        self.stopped.add(run_id)

    def commands(self, running: Sequence[str]) -> list[dict[str, Any]]:
        """What an agent is told that has these runs at work: one at a time, and `exit` (which kills) after the last."""
        found = [{"type": "stop", "run_id": id} for id in running if id in self.stopped or self.state == "CANCELED"]
        if not running and self.state != "PAUSED":
            found = [self.next_run()]
        self.told += [(command["type"], command.get("run_id", "")) for command in found]
        return found

    def next_run(self) -> dict[str, Any]:
        """The command that starts a run, or ends the agent."""
        full = len(self.runs) >= self.config.get("run_cap", math.inf)
        point = None if full or self.state != "RUNNING" else next(self.points, None)
        if point is None:
            self.state = "FINISHED" if self.state == "RUNNING" else self.state
            return {"type": "exit"}
        id = f"{self.id}run{len(self.runs)}"
        self.runs[id] = point
        args = {name: {"value": value} for name, value in point.items()}
        return {"type": "run", "run_id": id, "program": self.config.get("program", ""), "args": args}


class WandbServer:
    """`with WandbServer() as server:` serves on a free port of 127.0.0.1. Run the client with `server.env`."""

    def __init__(self):
        self.runs: dict[tuple[str, str, str], Run] = {}  # by entity, project and id
        self.sweeps: dict[str, Sweep] = {}  # by id
        self.points: list[dict[str, Any]] = []  # what a sweep begun from now on tries, unless it is a grid
        self.requests: list[tuple[str, str, str]] = []  # method, path, GraphQL operation or ""
        self.unknown: list[str] = []
        self.down = False  # drop every connection
        self.busy = False  # answer 503
        self.deny = False  # answer 401, as to a key that is not valid
        self.forbidden: set[str] = set()  # entities the key has no access to: answer 403
        self.lock = threading.Lock()
        self.ids = (f"id-{i}" for i in itertools.count())
        self.stored: dict[str, tuple[dict[str, bytes], str]] = {}  # path of a URL: the files and the name it is for
        self.http = QuietHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"wandb": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_ERROR_REPORTING": "false"}

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def graphql(self, body: dict) -> tuple[int, dict]:
        """The status and the body that answer a GraphQL request. An operation is a method do_<its name>."""
        variables, operation = body.get("variables") or {}, operation_name(body)
        where = {**(variables.get("input") or {}), **variables}
        if {where.get("entity"), where.get("entityName")} & self.forbidden:
            return 403, errors("permission denied")
        if not hasattr(self, f"do_{operation}"):
            raise NotEmulated(operation)
        return 200, {"data": getattr(self, f"do_{operation}")({**variables, "query": body["query"]})}

    def store(self, path: str, data: bytes | None) -> tuple[int, bytes]:
        """Keeps an uploaded file, or (no data) answers with a kept one."""
        files, name = self.stored.get(path, ({}, ""))
        if data is not None:
            files[name] = data
        return (200, files[name]) if name in files else (404, b"")

    def file_url(self, owner: Run | Artifact, name: str) -> str:
        """The URL that takes a file of a run or of an artifact, and gives it."""
        path = f"/storage/{owner.server_id}/{name}"
        self.stored[path] = owner.files if isinstance(owner, Run) else owner.uploads, name
        return self.url + quote(path)

    def stream(self, path: str, body: dict) -> tuple[int, bytes]:
        """Takes a part of a run's file stream: rows, summary, output; at the end its exit code."""
        _, _, entity, project, id, _ = path.split("/")
        run = self.runs.get((entity, project, id))
        if run is None:
            return 404, b""
        for name, part in (body.get("files") or {}).items():
            lines = map(without_nan, part["content"]) if name.endswith(".jsonl") else part["content"]
            run.streams.setdefault(name, {}).update(enumerate(lines, part["offset"]))
        run.summary = json.loads(without_nan((run.lines(SUMMARY) or ["{}"])[-1])) or run.summary
        if body.get("complete"):
            run.state = "failed" if body.get("exitcode") else "finished"
        return 200, b"{}"

    # Operations: the account

    def do_Viewer(self, _: dict) -> dict:
        """Whose key it is."""
        user = {"id": "user", "entity": USER, "username": USER, "email": "", "flags": "{}"}
        return {"viewer": {**user, "teams": page([], {})}}

    do_GetDefaultEntity = do_Viewer

    def do_ServerFeaturesQuery(self, _: dict) -> dict:
        """No features beyond those of an old server."""
        return {"serverInfo": {"features": []}}

    def do_OrganizationCoreWeaveOrganizationID(self, _: dict) -> dict:
        """Nobody's organization."""
        return {"entity": {"organization": None}}

    # Operations: runs

    def do_UpsertBucket(self, v: dict) -> dict:
        """Creates a run or changes one."""
        key = v.get("entity") or USER, v.get("project") or "uncategorized", v["name"]
        inserted = key not in self.runs
        run = self.runs.setdefault(key, Run(next(self.ids), *key, display_name=v["name"]))
        run.state = v.get("state") or "running"
        run.display_name = v.get("displayName") or run.display_name
        run.group = v.get("groupName") or run.group
        run.job_type = v.get("jobType") or run.job_type
        run.sweep = v.get("sweep") or run.sweep
        run.notes = v.get("notes") or run.notes
        run.tags = run.tags if v.get("tags") is None else v["tags"]
        run.raw_config = json.loads(v.get("config") or "null") or run.raw_config
        run.summary = json.loads(v.get("summaryMetrics") or "null") or run.summary
        return {"upsertBucket": {"bucket": run_node(run), "inserted": inserted}}

    def do_RunResumeStatus(self, v: dict) -> dict:
        """What a client needs to go on with a run; null in place of a run that does not exist."""
        entity = v.get("entity") or USER
        run = self.runs.get((entity, v["project"], v["name"]))
        return {"model": {**project_node(entity, v["project"]), "bucket": run and run_node(run)}}

    def project_runs(self, v: dict) -> list[Run]:
        """The runs of a project, the oldest first."""
        return [run for run in self.runs.values() if (run.entity, run.project) == (v["entity"], v["project"])]

    def of_run(self, v: dict, answer: Callable[[Run], dict]) -> dict:
        """What a query about a run yields: null in place of a project or a run that does not exist."""
        run = self.runs.get((v["entity"], v["project"], v.get("run") or v["name"]))
        project = {"internalId": "1", "run": run and answer(run)}
        return {"project": project if self.project_runs(v) else None}

    def do_Run(self, v: dict) -> dict:
        """All about one run."""
        return self.of_run(v, run_node)

    def do_RunFullHistory(self, v: dict) -> dict:
        """The rows of a run, and those about its machine."""
        streams = {"history": HISTORY, "events": EVENTS}
        return self.of_run(v, lambda run: {key: thin(run.lines(name), v["samples"]) for key, name in streams.items()})

    def do_RunHistoryKeys(self, v: dict) -> dict:
        """The last step of a run, and its keys."""
        return self.of_run(v, lambda run: {"historyKeys": run_node(run)["historyKeys"]})

    def do_RunSampledHistory(self, v: dict) -> dict:
        """For each spec the rows that have all of its keys, cut down to these keys."""

        def rows(run: Run, keys: list[str], samples: int) -> list[dict]:
            return thin([{k: row[k] for k in keys} for row in run.history if all(k in row for k in keys)], samples)

        specs = [json.loads(spec) for spec in v["specs"]]
        return self.of_run(v, lambda run: {"sampledHistory": [rows(run, s["keys"], s["samples"]) for s in specs]})

    def do_Runs(self, v: dict) -> dict:
        """The runs of a project. Filters can only ask for equality; the order is that of creation."""
        filters, order = json.loads(v.get("filters") or "{}"), v.get("order") or "+created_at"
        if order.lstrip("+-") != "created_at":
            raise NotEmulated(f"order {order}")
        runs = [run for run in self.project_runs(v) if all(is_so(run, *item) for item in filters.items())]
        nodes = [run_node(run) for run in (runs[::-1] if order[0] == "-" else runs)]
        asked = [{name: value for name, value in node.items() if name in v["query"]} for node in nodes]
        project = {**project_node(v["entity"], v["project"]), "runCount": len(runs), "runs": page(asked, v)}
        return {"project": project if self.project_runs(v) else None}

    def do_CreateRunFiles(self, v: dict) -> dict:
        """Where to upload files of a run."""
        run = self.runs[v["entity"], v["project"], v["run"]]
        files = [{"name": name, "uploadUrl": self.file_url(run, name)} for name in v["files"]]
        return {"createRunFiles": {"runID": run.server_id, "uploadHeaders": [], "files": files}}

    def do_RunFiles(self, v: dict) -> dict:
        """The files of a run, or those of some names."""

        def answer(run: Run) -> dict:
            names = [name for name in run.files if name in (v["fileNames"] or run.files)]
            nodes = [file_node(name, run.files[name], self.file_url(run, name)) for name in names]
            return {"fileCount": len(nodes), "files": page(nodes, v)}

        return self.of_run(v, answer)

    # Operations: sweeps

    def do_UpsertSweep(self, v: dict) -> dict:
        """Begins a sweep, or (with an id) changes its state or config."""
        sweep = next((sweep for sweep in self.sweeps.values() if sweep.server_id == v.get("id")), None)
        if sweep is None:
            place = v.get("entityName") or USER, v.get("projectName") or "uncategorized", f"sweep{len(self.sweeps)}"
            config = yaml.safe_load(v["config"])
            points = grid(config["parameters"]) if config["method"] == "grid" else self.points
            sweep = self.sweeps[place[-1]] = Sweep(next(self.ids), *place, config, iter(points))
        elif v.get("config"):
            raise NotEmulated("another config for a sweep")
        sweep.state = v.get("state") or sweep.state
        node = {"name": sweep.id, "project": project_node(sweep.entity, sweep.project)}
        return {"upsertSweep": {"sweep": node, "configValidationWarnings": []}}

    def find_sweep(self, v: dict) -> Sweep | None:
        """The sweep of an entity and a project that is meant."""
        sweep = self.sweeps.get(v["sweep"])
        entity = v.get("entity") or v.get("entityName") or USER
        return (
            sweep
            if sweep and (sweep.entity, sweep.project) == (entity, v.get("project") or v.get("projectName"))
            else None
        )

    def do_SweepWithRuns(self, v: dict) -> dict:
        """A sweep and its runs."""
        sweep = self.find_sweep(v)
        runs = [run_node(run) for run in self.runs.values() if sweep and run.sweep == sweep.id]
        return {"project": {"sweep": sweep and {**sweep_node(sweep), "runs": page(runs, {"perPage": len(runs)})}}}

    do_GetSweepState = do_SweepWithRuns

    def do_CreateAgent(self, v: dict) -> dict:
        """An agent reports for work."""
        sweep = self.find_sweep(v)
        if sweep is None:
            raise NotEmulated(f"an agent for the sweep {v['sweep']}, which there is not")
        sweep.agents.append(next(self.ids))
        return {"createAgent": {"agent": {"id": sweep.agents[-1]}}}

    def do_Heartbeat(self, v: dict) -> dict:
        """An agent says which runs it has at work and is told what to do."""
        sweep = next(sweep for sweep in self.sweeps.values() if v["id"] in sweep.agents)
        commands = sweep.commands(list(json.loads(v.get("runState") or "{}")))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    # Operations: artifacts

    def artifact(self, id: str) -> Artifact:
        """A version by the id it has here."""
        return next(a for run in self.runs.values() for a in run.artifacts if a.server_id == id)

    def versions(self, entity: str, project: str, name: str) -> list[Artifact]:
        """The committed versions of an artifact, the oldest first."""
        runs = self.project_runs({"entity": entity, "project": project})
        found = [a for run in runs for a in run.artifacts if a.name == name and a.version is not None]
        return sorted(found, key=lambda a: a.version or 0)

    def version(self, v: dict, name: str, alias: str) -> Artifact | None:
        """The version with this alias or number."""
        versions = self.versions(v["entity"], v["project"], name)
        return next((a for a in versions if alias in (f"v{a.version}", *a.aliases)), None)

    def do_ArtifactType(self, v: dict) -> dict:
        """The type of the artifact of this name, if there is one."""
        name, _, alias = v["name"].partition(":")
        artifact = self.version(v, name, alias or "latest")
        return {"project": {"artifact": artifact and artifact_node(artifact)}}

    def do_CreateArtifact(self, v: dict) -> dict:
        """Begins a version, unless there is one of this digest: then that one gets the aliases."""
        v = v["input"]
        run, name = self.runs[v["entityName"], v["projectName"], v["runName"]], v["artifactCollectionName"]
        versions = self.versions(run.entity, run.project, name)
        aliases = [alias["alias"] for alias in v.get("aliases") or []]
        artifact = next((a for a in versions if a.digest == v["digest"]), None)
        if artifact:
            self.give_aliases(artifact, aliases)
        else:
            more = aliases, v.get("metadata"), v.get("description")
            artifact = Artifact(next(self.ids), run, name, v["artifactTypeName"], v["digest"], *more)
            run.artifacts.append(artifact)
        sequence = {"latestArtifact": {"id": versions[-1].server_id} if versions else None}
        return {"createArtifact": {"artifact": {**artifact_node(artifact), "artifactSequence": sequence}}}

    def give_aliases(self, artifact: Artifact, aliases: list[str]) -> None:
        """Takes the aliases from the versions that had them."""
        for other in self.versions(artifact.run.entity, artifact.run.project, artifact.name):
            other.aliases = [alias for alias in other.aliases if alias not in aliases]
        artifact.aliases = sorted({*artifact.aliases, *aliases})

    def do_CreateArtifactFiles(self, v: dict) -> dict:
        """Where to upload files of a version."""
        files = [(self.artifact(file["artifactID"]), file["name"]) for file in v["input"]["artifactFiles"]]
        nodes = [{**self.upload(artifact, name), "storagePath": name} for artifact, name in files]
        return {"createArtifactFiles": {"files": page(nodes, {"perPage": len(nodes)})}}

    def upload(self, artifact: Artifact, name: str) -> dict:
        """A file of a version as a place to upload it to."""
        node = {"id": artifact.server_id, "uploadUrl": self.file_url(artifact, name), "uploadHeaders": []}
        return {**node, "uploadMultipartUrls": None, "artifact": {"id": artifact.server_id}}

    def do_CreateArtifactManifest(self, v: dict) -> dict:
        """Where to upload the manifest of a version."""
        artifact = self.artifact(v["artifactID"])
        manifest = {"id": artifact.server_id, "file": self.upload(artifact, MANIFEST)}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def do_CommitArtifact(self, v: dict) -> dict:
        """Ends the upload of a version."""
        artifact = self.artifact(v["artifactID"])
        if artifact.version is None:
            self.give_aliases(artifact, artifact.aliases)
            artifact.version = len(self.versions(artifact.run.entity, artifact.run.project, artifact.name))
        return {"commitArtifact": {"artifact": artifact_node(artifact)}}

    def do_RunOutputArtifacts(self, v: dict) -> dict:
        """The versions a run logged."""

        def answer(run: Run) -> dict:
            return {"artifacts": page([artifact_node(a) for a in run.artifacts if a.version is not None], v)}

        return self.of_run(v, answer)

    def do_ArtifactByID(self, v: dict) -> dict:
        """All about one version."""
        return {"artifact": artifact_node(self.artifact(v["id"]))}

    def do_ArtifactMembershipByName(self, v: dict) -> dict:
        """A version by its name and an alias or number, `name:alias`."""
        name, _, alias = v["name"].partition(":")
        artifact = self.version(v, name, alias or "latest")
        node = artifact and membership_node(artifact)
        return {"project": {"artifactCollectionMembership": node} if self.project_runs(v) else None}

    def do_FetchArtifactManifest(self, v: dict) -> dict:
        """Where to download the manifest of a version."""
        url = self.file_url(self.artifact(v["id"]), MANIFEST)
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def do_GetArtifactMembershipFileUrls(self, v: dict) -> dict:
        """Where to download the files of a version."""
        artifact = self.version(v, v["collection"], v["alias"])
        if artifact is None:
            return {"project": {"artifactCollection": None}}
        nodes = [file_node(name, data, self.file_url(artifact, name)) for name, data in artifact.files.items()]
        membership = {"artifactMembership": {"files": page(nodes, v)}}
        return {"project": {"artifactCollection": {"__typename": "ArtifactSequence", **membership}}}


def grid(parameters: dict[str, dict]) -> Iterator[dict[str, Any]]:
    """The points of a grid in W&B's order: names sorted, the last one fastest."""
    names = sorted(parameters)
    for point in itertools.product(*(choices(parameters[name]) for name in names)):
        yield dict(zip(names, point, strict=True))


def choices(parameter: dict) -> list[Any]:
    """The values of a parameter of a grid."""
    match parameter:
        case {"value": value}:
            return [value]
        case {"values": values}:
            return values
        case {"parameters": inner}:
            return list(grid(inner))
        case {"min": int(low), "max": int(high)}:
            return list(range(low, high + 1))
    raise NotEmulated(f"a grid over {parameter}")


# Parts of replies


def errors(message: str) -> dict:
    """A GraphQL answer that has an error in place of data."""
    return {"errors": [{"message": message, "path": [], "extensions": {"code": "PERMISSION_ERROR"}}], "data": None}


def page(nodes: Sequence[dict], v: dict) -> dict:
    """One page of a list. A cursor is the number of nodes up to it."""
    start = int(v.get("cursor") or v.get("fileCursor") or 0)
    stop = start + int(v.get("perPage") or v.get("fileLimit") or 50)
    edges = [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes[start:stop], start + 1)]
    info = {"endCursor": str(start + len(edges)), "hasNextPage": stop < len(nodes)}
    return {"edges": edges, "pageInfo": info, "totalCount": len(nodes)}


def thin(rows: list, samples: int) -> list:
    """Every n-th row, so that no more than `samples` are left."""
    return rows[:: -(-len(rows) // samples) or 1]


def without_nan(line: str) -> str:
    """JSON has no NaN and no Infinity: W&B gives them back as strings."""
    return json.dumps(json.loads(line, parse_constant=str))


def is_so(run: Run, key: str, value: Any) -> bool:
    """Whether `config.<name>`, `summary_metrics.<name>` or a field of a run has this value."""
    kind, _, name = key.partition(".")
    if isinstance(value, dict) or key.startswith("$"):
        raise NotEmulated(f"filter {key}: {value}")
    if kind == "config":
        return run.config.get(name.removesuffix(".value")) == value
    return run.summary.get(name) == value if kind == "summary_metrics" else run_node(run).get(key) == value


def project_node(entity: str, name: str) -> dict:
    """A project as GraphQL shows it; so on for what follows."""
    return {"id": "project", "internalId": "1", "name": name, "entity": {"id": entity, "name": entity}}


def run_node(run: Run) -> dict:
    """A run. The client wants projectId as a string, and many fields as JSON in a string."""
    history, events, output = run.lines(HISTORY), run.lines(EVENTS), run.lines("output.log")
    last_step = json.loads(history[-1])["_step"] if history else -1
    own_config = run.raw_config.get("_wandb", {}).get("value", {})  # without its "t" the client does not resume
    texts = {"config": run.raw_config, "wandbConfig": own_config, "summaryMetrics": run.summary, "systemMetrics": {}}
    texts |= {"historyTail": history[-1:], "eventsTail": events[-1:]}
    return {
        **{"id": run.server_id, "name": run.id, "displayName": run.display_name, "state": run.state, "tags": run.tags},
        **{"group": run.group, "jobType": run.job_type, "notes": run.notes, "description": None, "commit": None},
        **{
            "project": project_node(run.entity, run.project),
            "projectId": "1",
            "sweepName": run.sweep,
            "readOnly": False,
        },
        **{"historyLineCount": len(history), "eventsLineCount": len(events), "logLineCount": len(output)},
        **{"historyKeys": {"lastStep": last_step, "keys": {key: {} for row in run.history for key in row}}},
        **{"user": {"name": USER, "username": USER}, "createdAt": CREATED, "heartbeatAt": CREATED},
        **{name: json.dumps(value) for name, value in texts.items()},
    }


def sweep_node(sweep: Sweep) -> dict:
    config = {"config": yaml.safe_dump(sweep.config), "method": sweep.config["method"], "description": None}
    times = dict.fromkeys(["createdAt", "heartbeatAt", "updatedAt"], CREATED)
    more = {"earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None}
    return {"id": sweep.server_id, "name": sweep.id, "state": sweep.state, **config, **times, **more}


def artifact_node(artifact: Artifact) -> dict:
    sequence, sizes = sequence_node(artifact), [len(data) for data in artifact.files.values()]
    return {
        **{"__typename": "Artifact", "id": artifact.server_id, "artifactType": {"name": artifact.type}},
        **{"artifactSequence": sequence, "versionIndex": artifact.version, "aliases": alias_nodes(artifact)},
        **{"state": "PENDING" if artifact.version is None else "COMMITTED", "digest": artifact.digest, "tags": []},
        **{"size": sum(sizes), "fileCount": len(sizes), "metadata": artifact.metadata, "createdAt": CREATED},
        **{"description": artifact.description, "historyStep": None, "commitHash": None, "updatedAt": None},
        **{"ttlDurationSeconds": -1, "ttlIsInherited": True},
    }


def sequence_node(artifact: Artifact) -> dict:
    project = project_node(artifact.run.entity, artifact.run.project)
    return {"__typename": "ArtifactSequence", "name": artifact.name, "project": project}


def alias_nodes(artifact: Artifact) -> list[dict]:
    node = {"__typename": "ArtifactAlias", "artifactCollection": sequence_node(artifact)}
    return [{**node, "id": alias, "alias": alias} for alias in artifact.aliases]


def membership_node(artifact: Artifact) -> dict:
    """A version as a member of its collection."""
    node = {"__typename": "ArtifactCollectionMembership", "artifactCollection": sequence_node(artifact)}
    return {**artifact_node(artifact), **node, "artifact": artifact_node(artifact)}


def file_node(name: str, data: bytes, url: str) -> dict:
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    node = {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": len(data), "md5": md5}
    return {**node, "mimetype": "", "updatedAt": CREATED}


def operation_name(body: dict) -> str:
    """`Run` of `query Run($project: String!) {…}`."""
    words = body["query"].replace("(", " ").replace("{", " ").split()
    return next(name for kind, name in itertools.pairwise(words) if kind in ("query", "mutation"))


class QuietHTTPServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Nothing: a client that ends resets its connections."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the server answer it and writes the answer."""

    wandb: WandbServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def handle_request(self) -> None:
        """Answers one request, in the way the server's flags ask for."""
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
        path = unquote(urlsplit(self.path).path)
        with self.wandb.lock:
            operation = operation_name(json.loads(data)) if path == "/graphql" else ""
            self.wandb.requests.append((self.command, path, operation))
            if self.wandb.down:
                self.close_connection = True
                return
            try:
                reply = self.reply(path, data)
            except NotEmulated as error:
                self.wandb.unknown.append(str(error))
                reply = 400, errors(f"not emulated: {error}")
            except Exception as error:  # a defect of this server; without an answer the client would try for hours
                self.wandb.unknown.append(f"{operation or path}: {error!r}")
                reply = 400, errors(repr(error))
        self.send(*reply)

    do_GET = do_POST = do_PUT = handle_request

    def reply(self, path: str, data: bytes) -> tuple[int, bytes | dict]:
        """The status and the body to answer with."""
        if self.wandb.busy:
            return 503, b""
        if self.wandb.deny:
            return 401, errors("user is not logged in")
        if path == "/graphql":
            return self.wandb.graphql(json.loads(data))
        if path.startswith("/storage/"):
            return self.wandb.store(path, data if self.command == "PUT" else None)
        if path.endswith("/file_stream"):
            return self.wandb.stream(path, json.loads(data))
        raise NotEmulated(f"{self.command} {path}")

    def send(self, status: int, body: bytes | dict) -> None:
        """Writes an answer."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if body is data else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
