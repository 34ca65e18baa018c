"""The OpenAI-compatible HTTP gateway: parses, limits and answers; everything else is `AsyncClient`'s.

It has no state but counters: any number of gateways serve any number of Tritons. `app.create_app` makes it.
"""
