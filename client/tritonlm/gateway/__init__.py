"""The OpenAI-compatible HTTP gateway. It parses and limits requests and writes responses; `AsyncClient` does the rest.

It keeps counters only, so any number of gateways can serve any number of Tritons. `app.create_app` builds it.
"""
