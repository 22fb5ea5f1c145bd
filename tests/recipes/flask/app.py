"""An application that welcomes new users."""

from flask import Flask, request
from flask_mailman import EmailMessage, Mail


def create_app(**settings):
    app = Flask(__name__)
    app.config.update(settings)
    Mail(app)

    @app.post("/signup")
    def signup():
        welcome = EmailMessage("Welcome", "Hello!", "app@example.com", [request.form["email"]])
        welcome.send()
        return "", 204

    return app
