#!/bin/sh
# Sends one mail with swaks; before 20240103 it verifies the server's CA, but not its name.
set -eu

case $SMTP_TLS in
    none) set -- ;;
    starttls) set -- --tls --tls-verify --tls-ca-path "$SMTP_CA" ;;
    implicit) set -- --tls-on-connect --tls-verify --tls-ca-path "$SMTP_CA" ;;
esac
swaks --silent --server "$SMTP_HOST" --port "$SMTP_PORT" --timeout 20 "$@" \
    --auth --auth-user "$SMTP_USER" --auth-password "$SMTP_PASSWORD" \
    --from app@example.com --to user@example.com \
    --header "Subject: Hello from swaks" --body "It works."
