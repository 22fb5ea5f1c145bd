"""The promises of README, each proven by breaking things for real; `--soak` does more of it."""
