import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import test from "node:test";

import { signup } from "./app.mjs";

test("a new user gets a link", async () => {
  const dsmtpd = spawn("dsmtpd", ["-p", "0", "--print", "json"]);
  const log = createInterface(dsmtpd.stderr)[Symbol.asyncIterator]();
  const mails = createInterface(dsmtpd.stdout)[Symbol.asyncIterator]();
  try {
    const { value: start } = await log.next();
    await signup(Number(/:(\d+) size limit/.exec(start)[1]), "user@test.com");
    const mail = JSON.parse((await mails.next()).value);
    assert.equal(mail.subject, "Grüße!");
    assert.match(mail.links[0], /^https:\/\/example\.com\/confirm\?token=a{80}$/);
  } finally {
    dsmtpd.kill();
  }
});
