#!/bin/sh
# Sends one mail with msmtp.
set -eu

case $SMTP_TLS in
    none) set -- --tls=off ;;
    starttls) set -- --tls=on --tls-trust-file="$SMTP_CA" ;;
    implicit) set -- --tls=on --tls-starttls=off --tls-trust-file="$SMTP_CA" ;;
esac
msmtp --host="$SMTP_HOST" --port="$SMTP_PORT" --timeout=20 "$@" \
    --auth=plain --user="$SMTP_USER" --passwordeval='echo "$SMTP_PASSWORD"' \
    --from=app@example.com user@example.com <<'END'
From: app@example.com
To: user@example.com
Subject: Hello from msmtp

It works.
END
