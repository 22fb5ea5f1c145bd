from app import create_app


def test_a_new_user_is_welcomed(dsmtpd):
    app = create_app(MAIL_SERVER=dsmtpd.host, MAIL_PORT=dsmtpd.port)
    app.test_client().post("/signup", data={"email": "user@test.com"})
    (message,) = dsmtpd.messages
    assert message.rcpt_tos == ("user@test.com",)
    assert message.subject == "Welcome"
