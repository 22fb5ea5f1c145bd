import pytest
import shop


def test_an_order_is_confirmed_by_mail(dsmtpd):
    shop.order(dsmtpd.host, dsmtpd.port, "user@test.com")
    (message,) = dsmtpd.messages
    assert message.subject == "Your order"
    assert message.links == ("https://shop.example/orders/42",)


@pytest.mark.dsmtpd(fail="rcpt:451:*:1")
def test_an_order_is_retried_when_the_server_is_busy(dsmtpd):
    shop.order(dsmtpd.host, dsmtpd.port, "user@test.com")
    assert len(dsmtpd.messages) == 1
