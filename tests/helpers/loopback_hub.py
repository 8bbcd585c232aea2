"""A small model hub on 127.0.0.1 for the unmodified huggingface_hub client, with uploads and downloads.

    hub = LoopbackHub({"hf_alice": ("alice", "org")})  # a token, its user's namespace, and other namespaces
    hub.start()
    HfApi(endpoint=hub.url, token="hf_alice").create_repo("org/model")

Repositories are held in memory, models under their names and Spaces as "spaces/name"; a commit is a snapshot of all
files. Large files use LFS. Xet is not supported: set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results


class File(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Return git's object id or, for a large file, its SHA-256."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "sha256": self.oid, "size": len(self.content), "pointerSize": 130}
        return entry


class Commit(NamedTuple):
    sha: str
    title: str
    files: dict[str, File]
    parent: "Commit | None"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        # As on the real hub, a repository always has a commit.
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.commits.get(self.branches.get(branch))
        sha = hashlib.sha1(f"{len(self.commits)} {id(self)} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, files, parent)
        self.branches[branch] = sha
        return self.commits[sha]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    def __init__(self, tokens: dict[str, tuple[str, ...]]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD /path" of each request, in order
        # Faults to inject: the numbers of the large-file uploads that fail, counted from 1, and files that are served
        # truncated to half.
        self.failing_uploads: set[int] = set()
        self.truncated_files: set[tuple[str, str]] = set()  # (repo_id, path)
        self.uploads = 0
        self.lock = threading.Lock()

        class BoundHandler(Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[repo_id].find(revision).files.items()}


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        self.hub.requests.append(f"{self.command} {address.path}")
        try:
            for methods, pattern, action in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and self.command in methods.split():
                    given = {name: unquote(value) for name, value in match.groupdict("").items()}
                    if given.pop("kind", None) == "spaces":
                        given["repo_id"] = f"spaces/{given['repo_id']}"
                    with self.hub.lock:
                        answer = action(self, **given)
                    break
            else:
                raise Refusal(404, f"No such page: {self.command} {address.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            answer = refusal.status, {"error": refusal.message}, headers
        status, content, headers = (*answer, {})[:3]
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Return the namespaces that the request's token can read and write; none without a token."""
        if self.token is None:
            return ()
        if self.token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[self.token]

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        is_member = repo_id.removeprefix("spaces/").partition("/")[0] in self.namespaces
        if repository is None or (repository.private and not is_member):
            # Don't reveal whether a private repository exists.
            raise Refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write and not is_member:
            raise Refusal(403, f"Forbidden: pass a token with write access to {repo_id}")
        return repository

    def commit(self, repo_id: str, revision: str) -> Commit:
        commit = self.repository(repo_id).find(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Each method returns a status, a content and, if needed, headers.

    def whoami(self):
        if not self.namespaces:
            raise Refusal(401, "Invalid username or password.")
        user, *organizations = self.namespaces
        return 200, {"type": "user", "name": user, "orgs": [{"name": name} for name in organizations], "auth": {}}

    def create_repository(self):
        if not self.namespaces:
            raise Refusal(401, "Invalid username or password.")
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.namespaces[0]
        repo_id = f"{namespace}/{asked['name']}"
        if namespace not in self.namespaces:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
        if asked.get("type") == "space":
            if asked.get("sdk") not in ("gradio", "docker", "static"):
                raise Refusal(400, "sdk must be one of gradio, docker, static")
            repo_id = f"spaces/{repo_id}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}
        self.hub.repositories[repo_id] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, answer

    def validate_card(self):
        asked = json.loads(self.body)
        problems = (space_problems if asked["repoType"] == "space" else card_problems)(asked["content"])
        return 400 if problems else 200, {"errors": [{"message": problem} for problem in problems], "warnings": []}

    def preupload(self, repo_id, revision):
        self.repository(repo_id, write=True)
        known = self.commit(repo_id, revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            is_lfs = path.endswith(".safetensors") or b"\0" in base64.b64decode(asked["sample"])
            file = known.get(path)
            answers.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            answers[-1]["oid"] = None if file is None else file.oid
        return 200, {"files": answers}

    def large_file_batch(self, repo_id):
        self.repository(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            address = f"{self.hub.url}/large-files/{asked['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            objects.append({**asked, "actions": actions} if asked["oid"] not in self.hub.large_files else asked)
        return 200, {"transfer": "basic", "objects": objects}

    def upload_large_file(self, oid):
        self.hub.uploads += 1
        if self.hub.uploads in self.hub.failing_uploads:
            raise Refusal(400, "RequestTimeout: your socket connection was not read from or written to in time")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "The content is not that of the announced SHA-256")
        self.hub.large_files[oid] = self.body
        return 200, b""

    def verify_large_file(self, oid):
        if len(self.hub.large_files.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(422, "The large file was not uploaded")
        return 200, {}

    def create_commit(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.commit(repo_id, revision)
        title, files = "", dict(parent.files)
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.sha) != parent.sha:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(self.hub.large_files[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"Unknown operation: {key}")
        made = repository.commit(revision, title, files)
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.sha}", "commitOid": made.sha}

    def resolve(self, repo_id, revision, path):
        commit = self.commit(repo_id, revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            # The commit is returned even so; clients use it to cache that the file doesn't exist.
            return 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        content = file.content
        if (repo_id, path) in self.hub.truncated_files:
            content = content[: len(content) // 2]
            headers |= {"X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers

    def tree(self, repo_id, revision, folder):
        files = self.commit(repo_id, revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return 200, [file.describe(path) for path, file in inside.items()]

    def paths_info(self, repo_id, revision):
        files = self.commit(repo_id, revision).files
        asked = parse_qs(self.body.decode())["paths"]
        return 200, [files[path].describe(path) for path in asked if path in files]

    def model_info(self, repo_id, revision):
        commit = self.commit(repo_id, revision)
        card = commit.files.get("README.md")
        data = {} if card is None else ModelCard(card.content.decode(), ignore_metadata_errors=True).data.to_dict()
        answer = {
            "id": repo_id,
            "sha": commit.sha,
            "private": self.repository(repo_id).private,
            "gated": False,
            "tags": data.get("tags", []),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            "cardData": data,
        }
        return 200, {**answer, **{name: data[name] for name in ("pipeline_tag", "library_name") if name in data}}

    def references(self, repo_id):
        def listed(references, kind):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in references.items()]

        repository = self.repository(repo_id)
        return 200, {
            "branches": listed(repository.branches, "heads"),
            "tags": listed(repository.tags, "tags"),
            "converts": [],
        }

    def commits(self, repo_id, revision):
        history = self.repository(repo_id).history(self.commit(repo_id, revision).sha)
        date = "2024-01-01T00:00:00.000Z"
        return 200, [{"id": c.sha, "title": c.title, "message": "", "date": date, "authors": []} for c in history]

    def create_branch(self, repo_id, name):
        branches = self.repository(repo_id, write=True).branches
        if name in branches:
            raise Refusal(409, f"Reference {name} already exists")
        branches[name] = self.commit(repo_id, json.loads(self.body or b"{}").get("startingPoint", "main")).sha
        return 200, {}

    def create_tag(self, repo_id, revision):
        tags, name = self.repository(repo_id, write=True).tags, json.loads(self.body)["tag"]
        if name in tags:
            raise Refusal(409, f"Tag {name} already exists")
        tags[name] = self.commit(repo_id, revision).sha
        return 200, {}


def card_problems(content: str) -> list[str]:
    """Return the problems for which the hub rejects a model card's metadata.

    They come from the client's own parser and from the real hub's further requirements.
    """
    header = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if header is None:
        return []  # the real hub only warns
    try:
        data = yaml.safe_load(header[1])
        ModelCard(content)
        if isinstance(data, dict) and "model-index" in data:
            # Loading a card only logs a malformed list of results: check it here.
            model_index_to_eval_results(data["model-index"])
    except Exception as error:
        return [f"Invalid YAML metadata: {type(error).__name__} {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"]
    problems = []
    for name in ("tags", "datasets", "language", "metrics", "base_model"):
        value = data.get(name, [])
        if not isinstance(value, (str, list)) or not all(isinstance(item, str) for item in value):
            problems.append(f'"{name}" must be a string or a list of strings')
    for name in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(name, ""), str):
            problems.append(f'"{name}" must be a string')
    if not re.fullmatch(r"[a-z0-9.+-]*", str(data.get("license", ""))):
        problems.append('"license" must be one of the hub\'s identifiers')
    return problems


def space_problems(content: str) -> list[str]:
    """Return the problems of the header of a Space's README.md, which configures its page and its build."""
    header = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    data = yaml.safe_load(header[1]) if header else None
    if not isinstance(data, dict):
        return ["A Space's README.md begins with YAML metadata"]
    problems = [] if data.get("sdk") in ("gradio", "docker", "static") else ['"sdk" must be gradio, docker or static']
    problems += [
        f'"{name}" must be a string'
        for name in ("title", "sdk_version", "app_file", "license")
        if not isinstance(data.get(name, ""), str)
    ]
    if len(str(data.get("short_description", ""))) > 60:
        problems.append('"short_description" has at most 60 characters')
    models = data.get("models", [])
    if not isinstance(models, list) or not all(re.fullmatch(r"[^/]+(/[^/]+)?", str(model)) for model in models):
        problems.append('"models" must be a list of names')
    return problems


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
MODEL = f"/api/(?P<kind>models|spaces)/{REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repository),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", MODEL + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", MODEL + r"/commit/(?P<revision>[^/]+)", Handler.create_commit),
    ("POST", MODEL + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", MODEL + r"/branch/(?P<name>[^/]+)", Handler.create_branch),
    ("POST", MODEL + r"/tag/(?P<revision>[^/]+)", Handler.create_tag),
    ("GET", MODEL + r"/refs", Handler.references),
    ("GET", MODEL + r"/commits/(?P<revision>[^/]+)", Handler.commits),
    ("GET", MODEL + r"/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", Handler.tree),
    ("GET", MODEL + r"(/revision/(?P<revision>[^/]+))?", Handler.model_info),
    ("GET HEAD", f"(/(?P<kind>spaces))?/{REPO}" + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("POST", f"(/(?P<kind>spaces))?/{REPO}" + r"\.git/info/lfs/objects/batch", Handler.large_file_batch),
    ("PUT", r"/large-files/(?P<oid>[0-9a-f]{64})", Handler.upload_large_file),
    ("POST", r"/large-files/(?P<oid>[0-9a-f]{64})/verify", Handler.verify_large_file),
]
