"""HTTP exchanges and server logs: the status fits its reason, the length its body, the times run forward."""

from __future__ import annotations

from saepipe.demo.grammar import Writer

METHODS = ("GET", "GET", "GET", "POST", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS")
STATUS = {
    200: "OK",
    201: "Created",
    204: "No Content",
    301: "Moved Permanently",
    302: "Found",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
# What a server may answer to each method; 304 and 404 belong to reading, 201 and 409 to writing.
ANSWERS = {
    "GET": (200, 200, 200, 301, 302, 304, 403, 404, 500, 503),
    "HEAD": (200, 304, 404),
    "POST": (200, 201, 201, 400, 401, 409, 429, 502),
    "PUT": (200, 204, 400, 403, 409),
    "PATCH": (200, 204, 400, 409),
    "DELETE": (204, 204, 401, 404),
    "OPTIONS": (204, 405),
}
RESOURCES = (
    "users orders items images search login logout account cart products reviews posts comments files reports events "
    "sessions tokens messages invoices tags maps news videos tickets payments settings status health download upload"
).split()
FILES = ("index.html", "style.css", "app.js", "logo.png", "robots.txt", "feed.xml", "favicon.ico", "data.json")
PARAMETERS = "page limit sort lang user date format query id from to filter color size".split()
VALUES = "1 2 10 20 50 asc desc en he fr json xml all new red blue small large true false".split()
HOSTS = "shop news mail api static files blog maps login media".split()
DOMAINS = ("example.com", "example.org", "example.net", "test.example", "site.example")
AGENTS = ("curl/8.5.0", "Mozilla/5.0 (X11; Linux x86_64)", "python-requests/2.31", "Wget/1.21", "Go-http-client/2.0")
TYPES = ("text/html", "application/json", "text/plain", "image/png", "text/css", "application/xml")
LANGUAGES = ("en-US", "he-IL", "fr-FR", "de-DE", "es-ES")
SERVERS = ("nginx/1.24.0", "Apache/2.4.57", "gunicorn", "Caddy", "envoy")
FIELDS = "id name status total price count email city state message error code title color owner active".split()
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def _path(writer: Writer) -> str:
    path = "/" + writer.pick(RESOURCES)
    if writer.chance(0.3):
        path = "/api/v" + str(writer.integer(1, 3)) + path
    draw = writer.random()
    if draw < 0.35:
        return f"{path}/{writer.integer(1, 999)}"
    if draw < 0.6:
        pairs = [f"{name}={writer.pick(VALUES)}" for name in writer.sample(PARAMETERS, writer.integer(1, 2))]
        return f"{path}?{'&'.join(pairs)}"
    return f"/{writer.pick(FILES)}" if draw < 0.75 else path


def _header(writer: Writer, name: str, value: str) -> None:
    writer.add(name, "http:header")
    writer.add(": ")
    writer.add(value, "http:value")
    writer.add("\n")


def _body(writer: Writer) -> str:
    pairs = []
    for name in writer.sample(FIELDS, writer.integer(1, 4)):
        value = str(writer.integer(1, 500)) if writer.chance(0.5) else f'"{writer.pick(VALUES)}"'
        pairs.append(f'"{name}": {value}')
    return "{" + ", ".join(pairs) + "}"


def _date(writer: Writer) -> str:
    return (
        f"{writer.pick(WEEKDAYS)}, {writer.integer(1, 28):02d} {writer.pick(MONTHS)} {writer.integer(2015, 2025)} "
        f"{writer.integer(0, 23):02d}:{writer.integer(0, 59):02d}:{writer.integer(0, 59):02d} GMT"
    )


def _send_body(writer: Writer, body: str) -> None:
    writer.add("\n")
    writer.add(body, "http:body")
    writer.add("\n")


def http(writer: Writer) -> None:
    """One to three requests to one host, each with its response."""
    host = f"{writer.pick(HOSTS)}.{writer.pick(DOMAINS)}"
    agent, server, language = writer.pick(AGENTS), writer.pick(SERVERS), writer.pick(LANGUAGES)
    for exchange in range(writer.integer(1, 3)):
        if exchange:
            writer.add("\n")
        method = writer.pick(METHODS)
        writer.add(method, "http:method")
        writer.add(" ")
        path = _path(writer)
        writer.add(path, "http:path")
        writer.add(" ")
        writer.add("HTTP/1.1", "http:version")
        writer.add("\n")
        _header(writer, "Host", host)
        _header(writer, "User-Agent", agent)
        if writer.chance(0.6):
            _header(writer, "Accept-Language", language)
        if writer.chance(0.3):
            _header(writer, "Cookie", f"session={writer.integer(100, 999)}{writer.pick('abcdef')}")
        if method in ("POST", "PUT", "PATCH"):
            body = _body(writer)
            _header(writer, "Content-Type", "application/json")
            _header(writer, "Content-Length", str(len(body)))
            _send_body(writer, body)
        writer.add("\n")
        _response(writer, method, path, server)


def _response(writer: Writer, method: str, path: str, server: str) -> None:
    status = writer.pick(ANSWERS[method])
    writer.add("HTTP/1.1", "http:version")
    writer.add(" ")
    writer.add(str(status), "http:status", "http:error" if status >= 400 else "http:success")
    writer.add(" ")
    writer.add(STATUS[status], "http:reason")
    writer.add("\n")
    _header(writer, "Date", _date(writer))
    _header(writer, "Server", server)
    if status in (301, 302):
        _header(writer, "Location", "/new" + path)
    elif status == 401:
        _header(writer, "WWW-Authenticate", "Basic")
    elif status in (429, 503):
        _header(writer, "Retry-After", str(60 * writer.integer(1, 9)))
    elif status == 304 or writer.chance(0.3):
        _header(writer, "Cache-Control", f"max-age={writer.integer(1, 9)}00")
    if status >= 400 and method != "HEAD":
        body = f'{{"error": "{STATUS[status].lower()}", "code": {status}}}'
        _header(writer, "Content-Type", "application/json")
        _header(writer, "Content-Length", str(len(body)))
        _send_body(writer, body)
    elif status == 200 and method != "HEAD":
        kind = writer.pick(TYPES[:2])
        body = _body(writer) if kind == "application/json" else f"<html><h1>{path}</h1></html>"
        _header(writer, "Content-Type", kind)
        _header(writer, "Content-Length", str(len(body)))
        _send_body(writer, body)


COMPONENTS = "auth db cache worker scheduler mailer proxy storage billing search gateway queue".split()
EVENTS = {
    "INFO": (
        "connection accepted from {ip}",
        "user {user} logged in",
        "job {job} finished in {ms} ms",
        "listening on port {port}",
        "cache hit for key {key}",
        "request {job} served in {ms} ms",
        "backup of {key} completed",
    ),
    "DEBUG": ("query took {ms} ms", "retry {digit} of 5 for job {job}", "key {key} expired", "heartbeat from {ip}"),
    "WARNING": (
        "slow query: {ms} ms",
        "disk usage at {percent}%",
        "login failed for user {user}",
        "memory usage at {percent}%",
        "certificate expires in {digit} days",
    ),
    "ERROR": (
        "connection to {ip} timed out after {ms} ms",
        "job {job} failed: {reason}",
        "cannot open {key}: {reason}",
        "user {user} denied: {reason}",
    ),
}
REASONS = ("permission denied", "out of memory", "file not found", "invalid token", "connection reset", "disk full")
USERS = "admin root alice bob carol dave guest backup deploy test".split()
LEVELS = ("INFO", "INFO", "INFO", "INFO", "DEBUG", "DEBUG", "WARNING", "ERROR")


def log(writer: Writer) -> None:
    """Lines of a server log, a few seconds apart, about the same few addresses, users and jobs."""
    day = f"{writer.integer(2018, 2025)}-{writer.integer(1, 12):02d}-{writer.integer(1, 28):02d}"
    second = writer.integer(0, 80_000)
    network = f"10.{writer.integer(0, 9)}.{writer.integer(0, 30)}"
    components, users = writer.sample(COMPONENTS, 3), writer.sample(USERS, 2)
    job, port = writer.integer(100, 9000), writer.pick((80, 443, 5432, 6379, 8000, 8080))
    for _ in range(writer.integer(6, 14)):
        second += writer.integer(0, 9)
        clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        writer.add(f"{day} {clock}", "log:timestamp")
        writer.add(" ")
        level = writer.pick(LEVELS)
        writer.add(level, "log:level")
        writer.add(" [")
        writer.add(writer.pick(components), "log:component")
        writer.add("] ")
        job += writer.integer(0, 1)
        message = writer.pick(EVENTS[level]).format(
            ip=f"{network}.{writer.integer(1, 9)}", user=writer.pick(users), job=job, port=port,
            ms=writer.integer(1, 900), key=f"/var/{writer.pick(RESOURCES)}", percent=writer.integer(80, 99),
            digit=writer.integer(1, 5), reason=writer.pick(REASONS),
        )  # fmt: skip
        writer.add(message, "log:problem" if level in ("WARNING", "ERROR") else "log:message")
        writer.add("\n")
