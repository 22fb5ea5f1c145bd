#!/bin/sh
# Sends one mail with curl.
set -eu

case $SMTP_TLS in
    none) set -- "smtp://$SMTP_HOST:$SMTP_PORT" ;;
    starttls) set -- "smtp://$SMTP_HOST:$SMTP_PORT" --ssl-reqd --cacert "$SMTP_CA" ;;
    implicit) set -- "smtps://$SMTP_HOST:$SMTP_PORT" --cacert "$SMTP_CA" ;;
esac
curl --silent --show-error --max-time 20 "$@" \
    --user "$SMTP_USER:$SMTP_PASSWORD" \
    --mail-from app@example.com --mail-rcpt user@example.com --crlf --upload-file - <<'END'
From: app@example.com
To: user@example.com
Subject: Hello from curl

It works.
END
