"""The server of the report page: what it answers, to whom, and when the page is rendered again."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stbench.cli.compare import read_records
from stbench.compare.build import build_leaderboard
from stbench.core.errors import UserError
from stbench.report.page import render_page
from stbench.report.serve import ReportServer, version_of
from tests.fake_runs import write_run
from tests.report.pages import write_inspection


@pytest.fixture()
def server(tmp_path: Path) -> Iterator[ReportServer]:
    """A server of one run on a free port."""
    write_run(tmp_path, "vanilla", 0, [10.0, 3.0, 1.0])

    def render(live: str) -> str:
        records, entries = read_records([tmp_path])
        return render_page(build_leaderboard(records, entries), records, live=live)

    with ReportServer([tmp_path], render, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: ReportServer, path: str = "/", method: str = "GET", host: str = "") -> tuple[int, str]:
    """Return status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_the_page_names_its_version(server: ReportServer) -> None:
    code, page = get(server)
    assert code == 200
    assert f'data-live="{get(server, "/version")[1]}"' in page
    assert "connect-src 'self'" in page


def test_a_new_run_changes_version_and_page(server: ReportServer, tmp_path: Path) -> None:
    before, page = get(server, "/version")[1], get(server)[1]
    assert get(server)[1] == page
    write_run(tmp_path, "taught", 0, [8.0, 2.0, 0.5])
    assert get(server, "/version")[1] != before
    assert "taught" not in page and "taught" in get(server)[1]


def test_runs_and_other_files_are_watched(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "vanilla", 0, [10.0, 3.0, 1.0])
    paths = [tmp_path / "runs", write_inspection(tmp_path / "inspect")]
    versions = {version_of(paths)}
    paths[1].write_text("{}")
    versions.add(version_of(paths))
    write_run(tmp_path / "runs", "taught", 0, [8.0, 2.0, 0.5])
    versions.add(version_of(paths))
    assert len(versions) == 3 and version_of([tmp_path / "nowhere"])


def test_a_damaged_run_is_an_error_on_the_page_until_it_is_repaired(
    server: ReportServer, tmp_path: Path
) -> None:
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    content = (folder / "curve.jsonl").read_text()
    (folder / "curve.jsonl").write_text("{")
    assert "curve.jsonl" in get(server)[1]
    (folder / "curve.jsonl").write_text(content)
    assert "vanilla" in get(server)[1]


@pytest.mark.parametrize(
    "path", ["/spec.json", "/../spec.json", "//etc/passwd", "/version/", "/?x", "/%2e%2e/"]
)
def test_no_other_path_is_served(server: ReportServer, path: str) -> None:
    assert get(server, path) == (404, "not found\n")


def test_another_host_name_is_refused(server: ReportServer) -> None:
    assert get(server, host=f"evil.example:{server.server_port}")[0] == 403
    assert get(server, host=f"localhost:{server.server_port}")[0] == 200


def test_other_methods_are_refused(server: ReportServer) -> None:
    assert get(server, method="POST")[0] == 501
    assert get(server, method="HEAD") == (200, "")


def test_it_listens_on_the_loopback_address_only(server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_a_one_line_error(server: ReportServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot serve on 127.0.0.1 port \d+: .*choose another --port"):
        ReportServer([tmp_path], lambda live: "", "127.0.0.1", server.server_port)
