"""An application that reads its configuration on import."""

import os
from typing import Annotated

from fastapi import BackgroundTasks, Body, FastAPI
from fastapi_mail import ConnectionConfig, FastMail, MessageSchema, MessageType

app = FastAPI()
mail = FastMail(
    ConnectionConfig(
        MAIL_SERVER=os.environ["MAIL_SERVER"],
        MAIL_PORT=int(os.environ["MAIL_PORT"]),
        MAIL_FROM="app@example.com",
        MAIL_USERNAME="any",
        MAIL_PASSWORD="any",
        MAIL_STARTTLS=False,
        MAIL_SSL_TLS=False,
    )
)


@app.post("/signup", status_code=204)
async def signup(email: Annotated[str, Body()], tasks: BackgroundTasks) -> None:
    link = f"https://example.com/confirm?email={email}"
    message = MessageSchema(
        subject="Welcome",
        recipients=[email],
        body=f"Grüße! Confirm here: {link}",
        subtype=MessageType.plain,
    )
    tasks.add_task(mail.send_message, message)
