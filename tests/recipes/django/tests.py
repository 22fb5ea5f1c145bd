from django.contrib.auth.models import User
from django.test import TestCase

from dsmtpd.testing import Server

# Django's test runner would keep mails in memory instead.
SMTP = "django.core.mail.backends.smtp.EmailBackend"


class PasswordResetTest(TestCase):
    def test_the_link_in_the_mail_sets_a_new_password(self):
        User.objects.create_user("zoe", "zoe@example.com", "forgotten")
        with (
            Server() as server,
            self.settings(EMAIL_BACKEND=SMTP, EMAIL_HOST=server.host, EMAIL_PORT=server.port),
        ):
            self.client.post("/accounts/password_reset/", {"email": "zoe@example.com"})
        (message,) = server.messages
        (link,) = message.links
        form = self.client.get(link, follow=True)
        passwords = {"new_password1": "correct horse", "new_password2": "correct horse"}
        self.client.post(form.request["PATH_INFO"], passwords)
        assert self.client.login(username="zoe", password="correct horse")
