// An application that sends new users a link.

import nodemailer from "nodemailer";

export async function signup(port, email) {
  const transport = nodemailer.createTransport({ host: "127.0.0.1", port });
  await transport.sendMail({
    from: "app@example.com",
    to: email,
    subject: "Grüße!",
    text: "Confirm here: https://example.com/confirm?token=" + "a".repeat(80),
  });
}
