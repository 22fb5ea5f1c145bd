#!/usr/bin/env bash
set -e
mails=$(mktemp -d)
trap 'rm -r "$mails"' EXIT

dsmtpd -p 0 -d "$mails" -- ./run-tests
grep -q "^Subject: Welcome" "$mails"/new/*
