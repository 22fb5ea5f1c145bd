import unittest

import shop

from dsmtpd.testing import Server


class OrderTest(unittest.TestCase):
    def test_an_order_is_confirmed_by_mail(self):
        with Server() as server:
            shop.order(server.host, server.port, "user@test.com")
            (message,) = server.wait(1, timeout=5)
        self.assertEqual(message.subject, "Your order")
