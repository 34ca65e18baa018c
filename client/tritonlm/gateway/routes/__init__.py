"""The gateway's routes, one module per kind. Each handler parses the request, calls the client and responds."""

from . import adapters, batches, jobs, messages, models, older, openai, playground, responses, scoring, tools, usage

_MODULES = (openai, responses, messages, scoring, batches, older, jobs, models, adapters, tools, usage, playground)
ROUTERS = tuple(module.router for module in _MODULES)
