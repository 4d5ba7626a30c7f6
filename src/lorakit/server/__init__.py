"""The HTTP server: OpenAI's API over an engine, with adapters that come and go.

`app` puts the routes together, `gate` stands before all of them, `run` listens and drains. The
shapes of requests are in `payloads`, those of replies in `replies`.
"""
