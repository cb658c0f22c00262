"""Models, health, the API key, request ids, files, the chat page."""

from __future__ import annotations

import re
from pathlib import Path

import openai
import pytest
from PIL import Image

from mgvq_serve.app import WEB_DIR
from tests.serve.conftest import MODEL, RunningServer, ask, data_url, image_part
from tests.serve.fake_engine import MAX_MODEL_LEN


def test_models(client) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "mgvq")
    assert model.max_model_len == MAX_MODEL_LEN
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("meta/other")
    assert caught.value.code == "model_not_found"


def test_health(server: RunningServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/health/ready").json() == {"status": "ok"}


def test_openapi_document_resolves(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    references = re.findall(r"#/components/schemas/(\w+)", str(document))
    assert "Message" in references
    assert set(references) <= set(document["components"]["schemas"])


@pytest.mark.parametrize("given", ["abc-123", "A" * 128])
def test_request_id_is_echoed(server: RunningServer, given: str) -> None:
    response = server.http.get("/health", headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["A" * 129, "a b", 'x"<', ""])
def test_request_id_is_made(server: RunningServer, given: str) -> None:
    made = server.http.get("/nowhere", headers={"x-request-id": given}).headers["x-request-id"]
    assert made != given
    assert len(made) == 36


def test_api_key(serve) -> None:
    server = serve(api_key="s3cret-ü")
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": b"Basic s3cret-\xc3\xbc"},
        {"x-api-key": "wrong"},
    ):
        for path in ("/v1/models", "/v1/chat/completions", "/v1/nothing"):
            response = server.http.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-request-id"]
            assert response.json()["error"]["code"] == "invalid_api_key"
    for headers in ({"authorization": "bearer s3cret-ü"}, {"x-api-key": "s3cret-ü"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        assert server.http.get("/v1/models", headers=encoded).status_code == 200
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/").status_code == 200
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_files_are_read_below_the_allowed_folder_only(serve, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    Image.new("RGB", (31, 17)).save(allowed / "a b.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (allowed / "link.png").symlink_to(tmp_path / "outside.png")
    (allowed / "not.png").write_text("no picture")
    server = serve(allowed_local_media_path=allowed)

    def status(url: str) -> int:
        content = [image_part(url), {"type": "text", "text": "x"}]
        return server.post(ask() | {"messages": [{"role": "user", "content": content}]}).status_code

    assert status(f"file://{allowed}/a%20b.png") == 200
    assert server.engine.chat_processor.image_sizes == [(31, 17)]
    assert status(f"file://localhost{allowed}/a%20b.png") == 200
    assert status(f"file://{allowed}/not.png") == 400
    assert status(f"file://{allowed}/missing.png") == 400
    assert status(f"file://{allowed}") == 400
    assert status(f"file://{allowed}/%00.png") == 400
    assert status(f"file://{tmp_path}/outside.png") == 403
    assert status(f"file://{tmp_path}/missing.png") == 403  # does not tell what exists out there
    assert status(f"file://{allowed}/../outside.png") == 403
    assert status(f"file://{allowed}/link.png") == 403
    assert status(f"file://elsewhere{allowed}/a%20b.png") == 403
    assert status("file:///etc/passwd") == 403


def test_pictures_have_a_limit_alone_and_together(serve) -> None:
    server = serve(max_image_pixels=1000)

    def ask_about(*sizes: tuple[int, int]) -> tuple[int, str | None]:
        content = [*(image_part(data_url(size)) for size in sizes), {"type": "text", "text": "x"}]
        response = server.post(ask() | {"messages": [{"role": "user", "content": content}]})
        error = response.json().get("error", {})
        return response.status_code, error.get("param")

    url = "messages[0].content[{}].image_url.url"
    assert ask_about((40, 25), (40, 25)) == (200, None)
    assert ask_about((40, 26)) == (400, url.format(0))
    assert ask_about((40, 25), (40, 25), (1, 1)) == (400, url.format(2))


def test_page_is_one_file_that_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    response = server.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = (WEB_DIR / "index.html").read_text(encoding="utf-8")
    assert response.text == page
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert sorted(path.name for path in WEB_DIR.iterdir()) == ["index.html"]


def test_example_pictures(serve, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    Image.new("RGB", (5, 5)).save(picture)
    server = serve(pictures=(picture,))
    [entry] = server.http.get("/assets/pictures").json()["pictures"]
    assert entry == {"name": "cat.png", "url": "/assets/pictures/cat.png"}
    response = server.http.get(entry["url"])
    assert response.headers["content-type"] == "image/png"
    assert response.content == picture.read_bytes()
    for wrong in ("dog.png", "..%2fcat.png", "%2e%2e/cat.png"):
        assert server.http.get(f"/assets/pictures/{wrong}").status_code == 404


def test_no_pictures(server: RunningServer) -> None:
    assert server.http.get("/assets/pictures").json() == {"pictures": []}
