import pytest
from fastapi.testclient import TestClient


@pytest.fixture(scope="session")
def client(dsmtpd_session):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAIL_SERVER", dsmtpd_session.host)
        patch.setenv("MAIL_PORT", str(dsmtpd_session.port))
        from app import app  # reads them on import

        yield TestClient(app)


def test_a_new_user_gets_a_link(client, dsmtpd_session):
    client.post("/signup", json="user@test.com")
    (message,) = dsmtpd_session.messages
    assert message.text.startswith("Grüße!")
    assert message.links == ("https://example.com/confirm?email=user@test.com",)
