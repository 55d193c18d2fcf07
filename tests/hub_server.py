"""A small local Hub: repositories with commits, tags, pull requests, large files, and failures on demand.

It implements the requests of huggingface_hub for publishing and downloading models over Git LFS. Large files are served
from a second port, because the client treats a redirect within one origin as a renamed repository.
"""
import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import socket
import threading
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import _http

OWNER, STRANGER = 'hf_owner', 'hf_stranger'  # tokens


@dataclasses.dataclass(frozen=True)
class File:
    oid: str
    content: bytes
    large: bool


@dataclasses.dataclass
class Repository:
    private: bool
    commits: Dict[str, Dict[str, File]] = dataclasses.field(default_factory=dict)
    refs: Dict[str, str] = dataclasses.field(default_factory=dict)
    tags: Dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, ref: str, files: Dict[str, File]) -> str:
        summary = json.dumps([len(self.commits), ref, sorted((name, f.oid) for name, f in files.items())])
        oid = hashlib.sha1(summary.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


@dataclasses.dataclass
class Fault:
    """A failure of matching requests, from request number `at` on.

    Attributes:
        status: Answer with this status.
        drop: Close the connection without an answer.
        lose: Process the request, then close the connection without an answer.
        short: Close the connection after this many bytes of the body.
        flip: Change one bit in the middle of the body.
        hang: Stop in the middle of the sent or received body until the client disconnects.
    """
    method: str
    pattern: str
    at: int = 1
    times: int = 1_000_000
    status: int = 0
    drop: bool = False
    lose: bool = False
    short: Optional[int] = None
    flip: bool = False
    hang: bool = False
    seen: int = 0
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)


class Refusal(Exception):
    def __init__(self, status: int, code: str = '', headers: Optional[Dict[str, str]] = None):
        super().__init__(code)
        self.status = status
        self.headers = dict(headers or {}, **({'X-Error-Code': code} if code else {}))


Answer = Tuple[int, Dict[str, str], bytes]


def as_json(content, status: int = 200) -> Answer:
    return status, {'Content-Type': 'application/json'}, json.dumps(content).encode()


class Hub:
    """The state of the server, which both ports share.

    Attributes:
        users: User by token. `owner` may write to `org`, others may only read.
        repositories: Repository by 'organization/name'.
        large_files: Content by SHA-256, including files that no commit has.
        requests: Method and path of each request, in order.
        xet_store: Folder where clients of the Xet protocol store and read large files; None for Git LFS.
        xet_hashes: Hash of the Xet protocol by SHA-256.
    """

    def __init__(self) -> None:
        self.users = {OWNER: 'owner', STRANGER: 'stranger'}
        self.writers = {'org': {'owner'}}
        self.repositories: Dict[str, Repository] = {}
        self.large_files: Dict[str, bytes] = {}
        self.requests: List[str] = []
        self.xet_store: Optional[Path] = None
        self.xet_hashes: Dict[str, str] = {}
        self.faults: List[Fault] = []
        self.lock = threading.RLock()
        self.servers = [self._serve(), self._serve()]
        self.url, self.store_url = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)

    def _serve(self) -> http.server.ThreadingHTTPServer:
        handler = type('Handler', (_Handler,), dict(hub=self))
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, method: str, pattern: str, **kwargs) -> Fault:
        """Makes requests fail from now on, see `Fault`."""
        self.faults.append(Fault(method, pattern, **kwargs))
        return self.faults[-1]

    def heal(self) -> None:
        self.faults.clear()

    def fault_of(self, method: str, path: str) -> Optional[Fault]:
        for fault in self.faults:
            if method == fault.method and re.search(fault.pattern, path):
                fault.seen += 1
                if fault.at <= fault.seen < fault.at + fault.times:
                    return fault
        return None

    def head(self, name: str, ref: str = 'main') -> Optional[str]:
        """Returns the commit of a branch, tag or pull request."""
        repository = self.repositories.get(name)
        return repository.resolve(ref) if repository else None

    def files(self, name: str, ref: str = 'main') -> Dict[str, bytes]:
        """Returns the files of a commit."""
        repository = self.repositories[name]
        return {path: file.content for path, file in repository.commits[repository.resolve(ref)].items()}

    def environment(self, home, token: Optional[str] = None) -> Dict[str, str]:
        """Returns the environment of a process that uses only this Hub."""
        hidden = ('HF_', 'HUGGING_FACE_', 'HUGGINGFACE_')
        own = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        return dict(
            own, HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
            **({'HF_TOKEN': token} if token else {}))

    # request handlers

    def answer(self, method: str, path: str, query: Dict[str, List[str]], token: Optional[str], body: bytes) -> Answer:
        if token is not None and token not in self.users:
            raise Refusal(401)
        user = self.users.get(token or '')
        for methods, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods.split():
                with self.lock:
                    groups = {key: unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, f'_{name}')(user=user, query=query, body=body, **groups)
        raise Refusal(404)

    def _readable(self, repo: str, user: Optional[str]) -> Repository:
        repository = self.repositories.get(repo)
        if repository is None or repository.private and not self._may_write(repo, user):
            raise Refusal(404 if user else 401, 'RepoNotFound')
        return repository

    def _writable(self, repo: str, user: Optional[str]) -> Repository:
        if user is None:
            raise Refusal(401)
        repository = self._readable(repo, user)
        if not self._may_write(repo, user):
            raise Refusal(403)
        return repository

    def _may_write(self, repo: str, user: Optional[str]) -> bool:
        organization = repo.partition('/')[0]
        return user in self.writers.get(organization, {organization})

    def _revision(self, repo: str, user: Optional[str], revision: str) -> Tuple[str, Dict[str, File]]:
        repository = self._readable(repo, user)
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, 'RevisionNotFound')
        return oid, repository.commits[oid]

    def _whoami(self, user, **_) -> Answer:
        if user is None:
            raise Refusal(401)
        return as_json(dict(type='user', name=user, orgs=[dict(name=o) for o, w in self.writers.items() if user in w]))

    def _create(self, user, body, **_) -> Answer:
        wanted = json.loads(body)
        name = f'{wanted.get("organization") or user}/{wanted["name"]}'
        if user is None or not self._may_write(name, user):
            raise Refusal(403 if user else 401)
        status = 409 if name in self.repositories else 200
        if status == 200:
            repository = self.repositories[name] = Repository(
                private=wanted.get('private', wanted.get('visibility') == 'private'))  # older clients, newer ones
            repository.commit('main', {'.gitattributes': _regular(b'*.safetensors filter=lfs\n')})
        return as_json(dict(url=f'{self.url}/{name}', name=name), status)

    def _info(self, repo, user, revision='main', **_) -> Answer:
        oid, files = self._revision(repo, user, revision)
        private = self.repositories[repo].private
        return as_json(dict(id=repo, sha=oid, private=private, siblings=[dict(rfilename=name) for name in files]))

    def _refs(self, repo, user, **_) -> Answer:
        tags = self._readable(repo, user).tags
        return as_json(dict(branches=[], converts=[], tags=[
            dict(name=name, ref=f'refs/tags/{name}', targetCommit=oid) for name, oid in tags.items()]))

    def _tree(self, repo, user, revision, **_) -> Answer:
        _, files = self._revision(repo, user, revision)
        return as_json([dict(
            type='file', path=name, size=len(f.content), oid=_regular(f.content).oid,
            **(dict(lfs=dict(oid=f.oid, size=len(f.content), pointerSize=134)) if f.large else {}),
        ) for name, f in files.items()])

    def _file(self, repo, user, revision, path, **_) -> Answer:
        oid, files = self._revision(repo, user, revision)
        headers = {'X-Repo-Commit': oid}
        if path not in files:
            raise Refusal(404, 'EntryNotFound', headers)
        file = files[path]
        if file.oid in self.xet_hashes:
            headers.update({
                'X-Xet-Hash': self.xet_hashes[file.oid],
                'X-Xet-Refresh-Route': f'{self.url}/api/models/{repo}/xet-read-token/{oid}'})
        if file.large:
            return 302, dict(headers, **{
                'X-Linked-Etag': f'"{file.oid}"', 'X-Linked-Size': str(len(file.content)),
                'Location': f'{self.store_url}/objects/{file.oid}'}), b''
        return 200, dict(headers, ETag=f'"{file.oid}"'), file.content

    def _validate(self, **_) -> Answer:
        return as_json(dict(errors=[], warnings=[]))

    def _preupload(self, repo, user, revision, body, query, **_) -> Answer:
        if 'create_pr' in query:
            self._readable(repo, user)
        else:
            self._writable(repo, user)
        _, existing = self._revision(repo, user, revision)
        return as_json(dict(files=[dict(
            path=file['path'], shouldIgnore=False,
            uploadMode='lfs' if file['path'].endswith('.safetensors') else 'regular',
            oid=existing[file['path']].oid if file['path'] in existing else None,
        ) for file in json.loads(body)['files']]))

    def _batch(self, body, **_) -> Answer:
        return as_json(dict(transfer='basic', objects=[
            dict(file) if file['oid'] in self.large_files else dict(
                file, actions=dict(upload=dict(href=f'{self.store_url}/objects/{file["oid"]}')))
            for file in json.loads(body)['objects']]))

    def _xet_token(self, repo, user, kind, **_) -> Answer:
        self._writable(repo, user) if kind == 'write' else self._readable(repo, user)
        token = dict(casUrl=f'local://{self.xet_store}', accessToken='unused', exp=2_000_000_000)
        names = zip(('X-Xet-Cas-Url', 'X-Xet-Access-Token', 'X-Xet-Token-Expiration'), token.values(), strict=True)
        status, headers, body = as_json(token)
        return status, dict(headers, **{name: str(value) for name, value in names}), body

    def _store(self, oid, body, **_) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400)
        self.large_files[oid] = body
        return 200, {}, b''

    def _fetch(self, oid, **_) -> Answer:
        return 200, {}, self.large_files[oid]

    def _commit(self, repo, user, revision, body, query, **_) -> Answer:
        create_pr = 'create_pr' in query
        repository = self._readable(repo, user) if create_pr else self._writable(repo, user)
        lines = [json.loads(line) for line in body.splitlines()]
        oid, files = self._revision(repo, user, revision)
        files = dict(files)
        for value in (line['value'] for line in lines if line['key'] == 'header'):
            if value.get('parentCommit') not in (None, oid):
                raise Refusal(412)
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = _regular(base64.b64decode(value['content']))
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.large_files and value['oid'] not in self.xet_hashes:
                    raise Refusal(400)
                content = self.large_files.get(value['oid'], b'\0' * value['size'])
                files[value['path']] = File(value['oid'], content, large=True)
            elif line['key'] == 'deletedFile':
                del files[value['path']]
        number = 1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)
        oid = repository.commit(f'refs/pr/{number}' if create_pr else revision, files)
        return as_json(dict(
            commitOid=oid, commitUrl=f'{self.url}/{repo}/commit/{oid}',
            pullRequestUrl=f'{self.url}/{repo}/discussions/{number}' if create_pr else None))

    def _tag(self, repo, user, revision, body, **_) -> Answer:
        tags, tag = self._writable(repo, user).tags, json.loads(body)['tag']
        if tag in tags:
            raise Refusal(409)
        tags[tag] = self._revision(repo, user, revision)[0]
        return 200, {}, b''


_REPO, _REV = r'(?P<repo>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
ROUTES = (
    ('GET', r'/api/whoami-v2', 'whoami'),
    ('POST', r'/api/repos/create', 'create'),
    ('POST', r'/api/validate-yaml', 'validate'),
    ('GET', rf'/api/models/{_REPO}', 'info'),
    ('GET', rf'/api/models/{_REPO}/revision/{_REV}', 'info'),
    ('GET', rf'/api/models/{_REPO}/refs', 'refs'),
    ('GET', rf'/api/models/{_REPO}/tree/{_REV}', 'tree'),
    ('POST', rf'/api/models/{_REPO}/preupload/{_REV}', 'preupload'),
    ('POST', rf'/api/models/{_REPO}/commit/{_REV}', 'commit'),
    ('POST', rf'/api/models/{_REPO}/tag/{_REV}', 'tag'),
    ('GET', rf'/api/models/{_REPO}/xet-(?P<kind>read|write)-token/{_REV}', 'xet_token'),
    ('POST', rf'/{_REPO}.git/info/lfs/objects/batch', 'batch'),
    ('GET HEAD', rf'/{_REPO}/resolve/{_REV}/(?P<path>.+)', 'file'),
    ('PUT', r'/objects/(?P<oid>[0-9a-f]{64})', 'store'),
    ('GET', r'/objects/(?P<oid>[0-9a-f]{64})', 'fetch'),
)


def _regular(content: bytes) -> File:
    return File(hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest(), content, large=False)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # otherwise each answer is delayed by 40 ms

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):  # the client has disconnected
            super().handle_one_request()

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append(f'{self.command} {url.path}')
            fault = self.hub.fault_of(self.command, url.path) or Fault('', '')
        body = self._read_body(fault)
        if body is None or fault.drop:
            self._hang_up()
            return
        try:
            if fault.status:
                raise Refusal(fault.status)
            token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
            status, headers, content = self.hub.answer(self.command, url.path, parse_qs(url.query), token, body)
        except Refusal as e:
            status, headers, content = e.status, e.headers, b''
        if fault.lose:
            self._hang_up()
            return
        if fault.flip:
            content = bytearray(content)
            content[len(content) // 2] ^= 1
        self.send_response(status)
        for key, value in dict(headers, **{'Content-Length': str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        end = len(content) // 2 if fault.hang else fault.short
        self.wfile.write(content[:end])
        if fault.hang:
            self._wait(fault)
        if end is not None:
            self._hang_up()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _read_body(self, fault: Fault) -> Optional[bytes]:
        """Returns the body, None if the client disconnects before it has sent the whole body."""
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            parts = []
            while size := int(self.rfile.readline() or b'-1', 16):
                part = self.rfile.read(size) if size > 0 else b''
                if len(part) < size or size < 0:
                    return None
                parts.append(part)
                self.rfile.readline()
                if fault.hang:
                    self._wait(fault)
            self.rfile.readline()
            return b''.join(parts)
        length = int(self.headers.get('Content-Length') or 0)
        if fault.hang and length > 1:
            self.rfile.read(length // 2)
            self._wait(fault)
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def _wait(self, fault: Fault) -> None:
        fault.reached.set()
        with contextlib.suppress(OSError):
            while self.connection.recv(1 << 20):
                pass

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args) -> None:
        pass


def point_at(monkeypatch, url: str, cache) -> None:
    """Makes the huggingface_hub of this process use only this Hub and cache, without delays between attempts."""
    for name, value in dict(
            ENDPOINT=url,
            HUGGINGFACE_CO_URL_TEMPLATE=url + '/{repo_id}/resolve/{revision}/{filename}',
            HF_HUB_CACHE=str(cache),
            HF_TOKEN_PATH=str(cache / 'no-token'),
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_PROGRESS_BARS=True,
    ).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr(_http.time, 'sleep', lambda seconds: None)
