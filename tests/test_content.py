from __future__ import annotations

from base64 import b64encode
from email.message import EmailMessage
from random import Random

import pytest

from dsmtpd.content import Attachment, Content, Reader

LINK = "https://shop.example/reset/MQ/abc-af8a1?next=%2Fhome&x=1"


def mail(*lines: str | bytes) -> bytes:
    octets = (line.encode() if isinstance(line, str) else line for line in lines)
    return b"\r\n".join(octets) + b"\r\n"


def content(*lines: str | bytes) -> Content:
    return Content.from_bytes(mail(*lines))


def test_fields_are_unfolded_and_decoded_in_order() -> None:
    whole = content(
        "From: =?utf-8?q?Zo=C3=AB?= <zoe@x.test>", "To: a@x,", "\tb@x", "to: c@x", b"X: \xe9", ""
    )
    assert whole.fields == (
        ("From", "Zoë <zoe@x.test>"),
        ("To", "a@x, b@x"),
        ("to", "c@x"),
        ("X", "é"),
    )
    assert whole.field("TO") == "a@x, b@x, c@x"
    assert whole.field("Cc") == ""


def test_the_first_subject_counts() -> None:
    assert content("Subject: one", "subject: two", "").subject == "one"
    assert content("From: a@x", "").subject == ""


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ([], LINK),
        (["Content-Type: text/plain; charset=utf-8"], LINK),
        (["Content-Transfer-Encoding: base64"], b64encode(LINK.encode()).decode()),
        (
            ["Content-Transfer-Encoding: quoted-printable"],
            LINK.replace("=", "=3D").replace("af8a", "af8=\r\na"),
        ),
    ],
)
def test_a_text_is_decoded_and_its_link_is_whole(fields: list[str], body: str) -> None:
    whole = content(*fields, "", body)
    assert whole.text.strip() == LINK
    assert whole.links == (LINK,)


@pytest.mark.parametrize(
    ("charset", "octets", "text"),
    [
        ("", "é".encode(), "é"),
        ("; charset=us-ascii", "é".encode(), "é"),
        ("; charset=US-ASCII", b"\xe9", "é"),
        ("; charset=iso-8859-1", b"\x80", "€"),
        ("; charset=gb2312", "é".encode("gb18030"), "é"),
        ("; charset=utf-8", b"\xc3\xa9\xff", "é\ufffd"),
        ("; charset=nonsense", "é".encode(), "é"),
        ("; charset=unicode_escape", rb"\d", r"\d"),
        ("; charset=zlib", b"a", "a"),
        ("; charset*=utf-8''utf-8", "é".encode(), "é"),
    ],
)
def test_a_text_is_decoded_with_the_charset_that_was_meant(
    charset: str, octets: bytes, text: str
) -> None:
    assert content(f"Content-Type: text/plain{charset}", "", octets).text == f"{text}\n"


def test_the_lines_of_a_text_end_with_lf() -> None:
    assert content("", "a", b"b\rc\nd", "").text == "a\nb\nc\nd\n\n"


def test_the_bodies_and_all_other_parts_are_found() -> None:
    whole = EmailMessage()
    whole.set_content("Hello!")
    whole.add_alternative("<p>Hello!</p>", subtype="html")
    whole.add_attachment(b"\0\1", maintype="image", subtype="png", filename="zoë.png")
    whole.add_attachment("an,other\n", subtype="csv", filename="a.csv")
    inner = EmailMessage()
    inner["Subject"] = "forwarded"
    inner.set_content("inside")
    whole.add_attachment(inner)
    read = Content.from_bytes(whole.as_bytes())
    assert (read.text, read.html) == ("Hello!\n", "<p>Hello!</p>\n")
    assert read.attachments[:2] == (
        Attachment("zoë.png", "image/png", b"\0\1"),
        Attachment("a.csv", "text/csv", b"an,other\n"),
    )
    (_, kind, octets) = read.attachments[2]
    assert kind == "message/rfc822"
    assert octets.startswith(b"Subject: forwarded\n")


def test_an_attached_or_second_text_is_an_attachment() -> None:
    whole = EmailMessage()
    whole.set_content("one")
    whole.make_mixed()
    whole.add_attachment("two", filename="two.txt")
    whole.attach(part := EmailMessage())
    part.set_content("three", disposition="inline")
    read = Content.from_bytes(whole.as_bytes())
    assert read.text == "one\n"
    assert [(name, octets) for name, _, octets in read.attachments] == [
        ("two.txt", b"two\n"),
        ("", b"three\n"),
    ]


def test_a_text_attached_without_a_name_is_not_the_body() -> None:
    whole = content("Content-Disposition: attachment", "", "attached")
    assert (whole.text, whole.attachments) == (
        "",
        (Attachment("", "text/plain", b"attached\r\n"),),
    )


def test_a_mail_with_only_html_has_no_text_but_is_readable() -> None:
    whole = content("Content-Type: text/html", "", "<p>Hi")
    assert (whole.text, whole.html, whole.attachments) == ("", "<p>Hi\n", ())
    assert whole.readable() == "Hi"


@pytest.mark.parametrize(
    ("text", "links"),
    [
        (
            "See https://x.test/a. And http://y.test/?b=1!",
            ["https://x.test/a", "http://y.test/?b=1"],
        ),
        ("(https://x.test/a_(b)) [https://y.test/]", ["https://x.test/a_(b)", "https://y.test/"]),
        ("<https://x.test/a>, https://x.test/a", ["https://x.test/a"]),
        ("**https://x.test/a**", ["https://x.test/a"]),
        ("HTTPS://x.test/é", ["HTTPS://x.test/é"]),
        ("ftp://x.test, x.test, https:// and a@x.test", []),
    ],
)
def test_links_in_a_text_end_before_punctuation(text: str, links: list[str]) -> None:
    assert list(content("Content-Type: text/plain; charset=utf-8", "", text).links) == links


def test_each_link_in_text_and_html_is_listed_once() -> None:
    whole = EmailMessage()
    whole.set_content("https://x.test/1 https://x.test/2")
    html = '<a href=" https://x.test/2 ">2</a><a href="app://3">3</a><area href="/4"><a href>5</a>'
    whole.add_alternative(f'{html}<a href="mailto:a@x">6</a><a href="#7">7</a>', subtype="html")
    links = Content.from_bytes(whole.as_bytes()).links
    assert links == ("https://x.test/1", "https://x.test/2", "app://3", "/4")


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<title>no</title><style>no</style><script>no</script><b>yes</b>", "yes"),
        ("Hello\n   <i>W</i>orld &amp; co&nbsp;&#x1f600;", "Hello World & co\xa0😀"),
        ("<h1>One</h1><p>two</p>three<br>four", "One\n\ntwo\n\nthree\nfour"),
        ("<div><div>one</div></div><div>two</div>", "one\ntwo"),
        ("<ul><li>one<li>two</ul>", "- one\n- two"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\nc"),
        ("<pre>a\n  b</pre> c  d", "a\n  b\n\nc d"),
        ('<a href="https://x.test/?a&amp;b">Reset</a> it', "Reset <https://x.test/?a&b> it"),
        ('<a href="https://x.test/">https://x.test/</a>', "https://x.test/"),
        ('<a href="https://x.test/"><img src="a"></a>', "<https://x.test/>"),
        ('<a href="#top">top</a><img alt="Logo">', "top[Logo]"),
        ("</a></pre></style>text<!-- no --><![CDATA[no]]>", "text"),
    ],
)
def test_html_becomes_text_with_its_links(html: str, text: str) -> None:
    assert Reader(html).text == text


def test_a_broken_multipart_is_kept_whole() -> None:
    whole = content("Content-Type: multipart/mixed", "", "lost?")
    assert whole.attachments == (Attachment("", "multipart/mixed", b"lost?\r\n"),)


def test_too_deeply_nested_parts_become_one_attachment() -> None:
    deep = (f"Content-Type: multipart/mixed; boundary={n}\r\n\r\n--{n}\r\n" for n in range(3000))
    whole = Content.from_bytes(b"Subject: deep\r\n" + "".join(deep).encode())
    assert whole.subject == "deep"
    assert [kind for _, kind, _ in whole.attachments] == ["multipart/mixed"]


PIECES = [
    *("Content-Type: ", "multipart/mixed; boundary=b", "text/plain", "text/html", "message/rfc822"),
    *("; charset=", "utf-7", "idna", "zlib", "\r\n", "\n", "\r", "--b", "--b--", "message/partial"),
    *("Content-Transfer-Encoding: ", "base64", "quoted-printable", "x-uue", "begin 644 x\n"),
    *(
        "Content-Disposition: attachment",
        "; filename=",
        "; filename*0*=utf-8''%ff",
        "=?utf-8?b?/?=",
    ),
    *("<a href='http://x'>", "<!--", "<![CDATA[", "&#x110000;", "&#xd800;", "<pre>", "<", '"', "("),
    *(";", "=", "'", "*", " ", "AAAA", "%", "Subject: ", "\udcff", "\0", "\u2028"),
]


def test_no_content_makes_reading_a_mail_fail() -> None:
    for seed in range(1500):
        chance = Random(seed)  # noqa: S311  # not for secrets
        pieces = chance.choices(PIECES, k=chance.randint(1, 60))
        whole = Content.from_bytes("".join(pieces).encode("utf-8", "surrogateescape"))
        assert "\r" not in whole.text + whole.html
        assert "\n\n\n" not in Reader(whole.html).text.strip()
