// Sends one mail with Nodemailer.

import { readFileSync } from "node:fs";

import nodemailer from "nodemailer";

const { SMTP_HOST, SMTP_PORT, SMTP_TLS, SMTP_USER, SMTP_PASSWORD, SMTP_CA } = process.env;

const transport = nodemailer.createTransport({
  host: SMTP_HOST,
  port: Number(SMTP_PORT),
  secure: SMTP_TLS === "implicit",
  requireTLS: SMTP_TLS === "starttls",
  ignoreTLS: SMTP_TLS === "none",
  tls: { ca: SMTP_CA && readFileSync(SMTP_CA) },
  auth: { user: SMTP_USER, pass: SMTP_PASSWORD },
  connectionTimeout: 20_000,
  greetingTimeout: 20_000,
  socketTimeout: 20_000,
});

await transport.sendMail({
  from: "app@example.com",
  to: "user@example.com",
  subject: "Hello from nodemailer",
  text: "It works.",
});
